"""`latentzoom generate`: draw new images from any bundle or registered model, at any height × width."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestration.output import (
    Dtype,
    Previews,
    check_file,
    check_folder,
    load_model,
    origin,
    parse_size,
    within_memory,
)
from pipeline.canvas import Facts, check_target, read_text
from pipeline.errors import UserError
from pipeline.geometry import Size
from pipeline.model import LatentZoom
from pipeline.progress import Progress

LARGE = 1 << 24
"""Pixels from which drawing a picture shows its own progress."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw new images. The same seed gives the same image at every size and for any --num and --batch. Run
    again, it goes on: pictures that this command made before are left as they are."""

    model: str
    """Bundle folder, URL, or models:/NAME@champion."""
    size: str = ""
    """Height x width, such as 700x1000, or one number for a square (default: the training size)."""
    num: int = 1
    """How many images; image i has seed + i."""
    seed: int = 0
    out: Path = Path("generated")
    """Folder, or one .png or .tif file with --num 1. TIFF is BigTIFF in tiles; memory does not grow with the size."""
    format: Literal["png", "tif"] = "png"
    """Files of an output folder."""
    sampler: Literal["dpm++", "ddim"] = "dpm++"
    steps: int = 20
    """Evaluations of the denoiser."""
    eta: float = 0.0
    """Noise added by DDIM, 0 to 1."""
    latent_size: str = ""
    """Latent cells, such as 64x96, for another shape of scene (default: the training size)."""
    batch: int = 8
    """Images sampled together."""
    preview: int = 0
    """Every so many steps, show the first picture as it stands in FILE.preview.png."""
    compile: bool = False
    """Compile the denoiser: slow to start, then faster; pays for many pictures on a GPU."""
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, cuda:1; default: CUDA where there is one")] = ""
    dtype: Dtype = "float32"
    """Precision of the networks. bfloat16 suits recent GPUs; it changes pixels by a level or two."""
    tracking_uri: str = ""
    """MLflow store for models:/ URIs (default: MLFLOW_TRACKING_URI)."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, prog="latentzoom generate", args=argv)
    if arguments.num < 1 or arguments.batch < 1:
        raise UserError(f"--num {arguments.num} --batch {arguments.batch}: use at least 1")
    suffix = arguments.out.suffix.lower()
    single = _is_single(arguments)
    if str(arguments.out) == "-" or suffix in (".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
        raise UserError(f"--out {arguments.out}: give a folder, or a .png or a .tif file")
    if single and arguments.num > 1:
        raise UserError(f"--out {arguments.out} is one file and --num {arguments.num} needs a folder")
    if arguments.preview < 0:
        raise UserError("--preview: use 0 or more")
    (check_file if single else check_folder)(arguments.out)
    model, name = load_model(arguments.model, arguments.device, arguments.tracking_uri, arguments.dtype)
    if model.config.task != "generation":
        raise UserError(f"{arguments.model} is a super-resolution model; use `latentzoom upscale`")
    size = parse_size(arguments.size) if arguments.size else (model.config.image_size,) * 2
    if arguments.compile:
        model.compile()
    todo = [s for s in range(arguments.seed, arguments.seed + arguments.num) if not _is_there(arguments, name, size, s)]
    with Progress("generate", arguments.num, "images", initial=arguments.num - len(todo)) as progress:
        for start in range(0, len(todo), arguments.batch):
            seeds = todo[start : start + arguments.batch]
            which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
            with within_memory(which, "give a smaller --batch, --dtype bfloat16 or a smaller --latent-size"):
                _batch(arguments, model, name, size, seeds, progress)
    print(arguments.out)
    return 0


def _is_single(arguments: Arguments) -> bool:
    return arguments.out.suffix.lower() in (".png", ".tif", ".tiff")


def _target(arguments: Arguments, size: Size, seed: int) -> Path:
    if _is_single(arguments):
        return arguments.out
    return arguments.out / f"seed-{seed:06d}-{size[0]}x{size[1]}.{arguments.format}"


def _text(arguments: Arguments, name: str, seed: int) -> dict[str, str]:
    """What a file says of how it was made: all that decides its pixels beside its size."""
    eta = f", eta {arguments.eta:g}" if arguments.sampler == "ddim" else ""
    facts = {"seed": seed, "sampler": f"{arguments.sampler}, {arguments.steps} steps{eta}", "dtype": arguments.dtype}
    if arguments.latent_size:
        facts["latent"] = "x".join(map(str, parse_size(arguments.latent_size)))
    return origin(name, {f"latentzoom:{key}": value for key, value in facts.items()})


def _is_there(arguments: Arguments, name: str, size: Size, seed: int) -> bool:
    """Whether an earlier run made this very picture; it is complete, since files appear whole."""
    return _text(arguments, name, seed).items() <= read_text(_target(arguments, size, seed)).items()


def _batch(
    arguments: Arguments, model: LatentZoom, name: str, size: Size, seeds: list[int], progress: Progress
) -> None:
    """Sample the latents of `seeds` together, then draw and write one picture after the other, in bounded memory."""
    targets = [_target(arguments, size, seed) for seed in seeds]
    check_target(targets[0], size)
    with Previews(model, targets[0], size, arguments.preview, is_shown=arguments.num <= arguments.batch) as previews:
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
        facts = Facts(text=_text(arguments, name, seed))
        drawing = model.drawing(latent[None], size, tile=max(latent.shape[-2:]))
        if size[0] * size[1] < LARGE:
            drawing.write(target, facts)
        else:
            with Progress(f"draw seed {seed}", size[0] * size[1], "pixels") as drawn:
                drawing.write(target, facts, drawn.update)
        progress.update(1)
