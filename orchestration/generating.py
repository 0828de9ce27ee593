"""The work of `latentzoom generate`: latents sampled in batches, pictures drawn one after the other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from orchestration import made_before
from orchestration.output import Previews, load_model, origin, slow_dtype, within_memory
from orchestration.verbs.generate import Arguments
from pipeline.beside import hidden
from pipeline.canvas import Facts
from pipeline.common_options import answer
from pipeline.errors import UserError
from pipeline.formats import format_of
from pipeline.kept import KeptPieces, drop, keep_pixels
from pipeline.model import LatentZoom
from pipeline.progress import Notice, Progress
from pipeline.sampling import OnStep
from pipeline.sizes import Size, parse_size

LARGE = 1 << 24
"""Pixels from which drawing a picture shows its own progress, and its latent and tiles are kept until it is done."""


def run(arguments: Arguments, notice: Notice) -> int:
    """Everything that the arguments ask for and that is not there yet; the notice is of the model's loading."""
    model, name = load_model(arguments.model, arguments.device, arguments.tracking_uri, arguments.dtype)
    notice.over()
    if line := slow_dtype(arguments.device, arguments.dtype):
        print(f"latentzoom: {line}", file=sys.stderr)
    if model.config.task != "generation":
        raise UserError(f"{arguments.model} is a super-resolution model; use `latentzoom upscale`")
    size = parse_size(arguments.size) if arguments.size else (model.config.image_size,) * 2
    if arguments.compile:
        model.compile()
    seeds_asked = range(arguments.seed, arguments.seed + arguments.num)
    wanted = [
        (str(_target(arguments, size, seed)), lambda seed=seed: _text(arguments, name, size, seed))
        for seed in seeds_asked
    ]
    todo = [seeds_asked[index] for index in made_before.todo(wanted, overwrite=arguments.overwrite)]
    num_before, is_shown = arguments.num - len(todo), arguments.num <= arguments.batch_size
    with (
        Progress("generate", arguments.num, "images", initial=num_before, is_ticking=not is_shown) as progress,
        _saying_what_is_kept(progress, size),
    ):
        for start in range(0, len(todo), arguments.batch_size):
            seeds = todo[start : start + arguments.batch_size]
            which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
            with within_memory(which, "give a smaller --batch-size, --dtype bfloat16 or a smaller --latent-size"):
                _batch(arguments, model, name, size, seeds, progress)
    answer(str(arguments.out), {"out": arguments.out, "files": [target for target, _ in wanted], "made": len(todo)})
    return 0


@contextlib.contextmanager
def _saying_what_is_kept(progress: Progress, size: Size) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if size[0] * size[1] >= LARGE:
            kept = "latents and tiles that are finished are kept; run the same command again to continue"
        elif progress.done:
            kept = f"{progress.done} of {progress.total} pictures are there; the same command continues with the others"
        else:
            kept = "no picture was finished, so the same command starts again"
        raise KeyboardInterrupt(kept) from None


def _target(arguments: Arguments, size: Size, seed: int) -> Path:
    if arguments.is_single:
        return arguments.out
    return arguments.out / f"seed-{seed:06d}-{size[0]}x{size[1]}.{arguments.format}"


def _text(arguments: Arguments, name: str, size: Size, seed: int) -> dict[str, str]:
    """What a file says of how it was made: all that decides its pixels."""
    eta = f", eta {arguments.eta:g}" if arguments.sampler == "ddim" else ""
    facts = {"seed": seed, "sampler": f"{arguments.sampler}, {arguments.steps} steps{eta}", "dtype": arguments.dtype}
    facts["size"] = f"{size[0]}x{size[1]}"
    if format_of(str(_target(arguments, size, seed))).is_lossy:
        facts["quality"] = arguments.quality
    if arguments.latent_size:
        facts["latent"] = "x".join(map(str, parse_size(arguments.latent_size)))
    return origin(name, {f"latentzoom:{key}": value for key, value in facts.items()})


def _batch(
    arguments: Arguments, model: LatentZoom, name: str, size: Size, seeds: list[int], progress: Progress
) -> None:
    """Sample the latents of `seeds` together, then draw and write one picture after the other, in bounded memory."""
    targets = [_target(arguments, size, seed) for seed in seeds]
    format_of(str(targets[0]), size)
    is_shown = arguments.num <= arguments.batch_size
    texts = [_text(arguments, name, size, seed) for seed in seeds]
    pieces = [_pieces(model, target, size, text) for target, text in zip(targets, texts)]
    sampled: dict[int, Tensor] = {}
    missing = [seed for seed, kept in zip(seeds, pieces) if kept is None or not kept.has("latent")]
    if missing:
        with Previews(model, targets[0], size, arguments.preview, is_shown, num_steps=arguments.steps) as previews:
            sampled = dict(zip(missing, _sampled(arguments, model, missing, previews.on_step)))

    def made(seed: int) -> Tensor:
        return sampled[seed] if seed in sampled else _sampled(arguments, model, [seed])[0]

    latents = [made(s) if kept is None else kept("latent", partial(made, s)) for s, kept in zip(seeds, pieces)]
    for seed, latent, target, text, kept in zip(seeds, latents, targets, texts, pieces):
        drawing = model.drawing(latent[None].to(model.device), size, tile=max(latent.shape[-2:]))
        facts, quality = Facts(text=text), arguments.quality
        if kept is None:
            drawing.write(target, facts, quality=quality)
        else:
            with Progress(f"draw seed {seed}", size[0] * size[1], "pixels", is_ticking=True) as drawn:
                drawing.write(target, facts, drawn.update, quality=quality, draw=keep_pixels(kept, drawing.pixels))
            kept.remove()
        progress.update(1)


def _sampled(arguments: Arguments, model: LatentZoom, seeds: list[int], on_step: OnStep | None = None) -> Tensor:
    """(B,C,h,w), unscaled."""
    return model.sample_latents(
        num=len(seeds),
        seed=seeds,
        sampler=arguments.sampler,
        num_steps=arguments.steps,
        eta=arguments.eta,
        latent_size=parse_size(arguments.latent_size) if arguments.latent_size else None,
        on_step=on_step,
    )


def _pieces(model: LatentZoom, target: Path, size: Size, text: Mapping[str, str]) -> KeptPieces | None:
    """For a large picture: where its latent and its finished tiles are kept until it is done."""
    folder = hidden(target, "parts")
    if size[0] * size[1] < LARGE:
        drop(folder)  # of other work that was to become this file
        return None
    return KeptPieces(folder, {**text, "device": model.device.type, "torch": str(torch.__version__)})
