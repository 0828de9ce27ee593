"""The work of `latentzoom generate`: latents sampled in batches, pictures drawn one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestration import made_before
from orchestration.output import Previews, load_model, origin, slow_dtype, within_memory
from orchestration.verbs.generate import Arguments
from pipeline.canvas import Facts
from pipeline.errors import UserError
from pipeline.formats import format_of
from pipeline.model import LatentZoom
from pipeline.progress import Notice, Progress
from pipeline.sizes import Size, parse_size

LARGE = 1 << 24
"""Pixels from which drawing a picture shows its own progress."""


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
    num_before, is_shown = arguments.num - len(todo), arguments.num <= arguments.batch
    with Progress("generate", arguments.num, "images", initial=num_before, is_ticking=not is_shown) as progress:
        for start in range(0, len(todo), arguments.batch):
            seeds = todo[start : start + arguments.batch]
            which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
            with within_memory(which, "give a smaller --batch, --dtype bfloat16 or a smaller --latent-size"):
                _batch(arguments, model, name, size, seeds, progress)
    print(arguments.out)
    return 0


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
    is_shown = arguments.num <= arguments.batch
    with Previews(model, targets[0], size, arguments.preview, is_shown, num_steps=arguments.steps) as previews:
        latents = model.sample_latents(
            num=len(seeds),
            seed=seeds,
            sampler=arguments.sampler,
            num_steps=arguments.steps,
            eta=arguments.eta,
            latent_size=parse_size(arguments.latent_size) if arguments.latent_size else None,
            on_step=previews.on_step,
        )
    for seed, latent, target in zip(seeds, latents, targets):
        facts = Facts(text=_text(arguments, name, size, seed))
        drawing = model.drawing(latent[None], size, tile=max(latent.shape[-2:]))
        if size[0] * size[1] < LARGE:
            drawing.write(target, facts, quality=arguments.quality)
        else:
            with Progress(f"draw seed {seed}", size[0] * size[1], "pixels") as drawn:
                drawing.write(target, facts, drawn.update, quality=arguments.quality)
        progress.update(1)
