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
from pipeline.canvas import Facts, check_target
from pipeline.errors import UserError
from pipeline.geometry import Size
from pipeline.model import LatentZoom
from pipeline.progress import Progress

LARGE = 1 << 24
"""Pixels from which drawing a picture shows its own progress."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw new images. The same seed gives the same image at every size and for any --num and --batch."""

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
    single = suffix in (".png", ".tif", ".tiff")
    if str(arguments.out) == "-" or suffix in (".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
        raise UserError(f"--out {arguments.out}: give a folder, or a .png or a .tif file")
    if single and arguments.num > 1:
        raise UserError(f"--out {arguments.out} is one file and --num {arguments.num} needs a folder")
    if arguments.preview < 0:
        raise UserError("--preview: use 0 or more")
    (check_file if single else check_folder)(arguments.out)
    model, name = load_model(arguments.model, arguments.device, arguments.tracking_uri, arguments.dtype)
    if model.config.task == "sr":
        raise UserError(f"{arguments.model} is a super-resolution model; use `latentzoom upscale`")
    size = parse_size(arguments.size) if arguments.size else (model.config.image_size,) * 2
    if arguments.compile:
        model.compile()
    with Progress("generate", arguments.num, "images") as progress:
        for start in range(0, arguments.num, arguments.batch):
            seeds = [arguments.seed + i for i in range(start, min(start + arguments.batch, arguments.num))]
            which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
            with within_memory(which, "give a smaller --batch, --dtype bfloat16 or a smaller --latent-size"):
                _batch(arguments, model, name, size, seeds, single, progress)
    print(arguments.out)
    return 0


def _batch(
    arguments: Arguments, model: LatentZoom, name: str, size: Size, seeds: list[int], single: bool, progress: Progress
) -> None:
    """Sample the latents of `seeds` together, then draw and write one picture after the other, in bounded memory."""
    targets = [
        arguments.out if single else arguments.out / f"seed-{seed:06d}-{size[0]}x{size[1]}.{arguments.format}"
        for seed in seeds
    ]
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
        facts = {"latentzoom:seed": seed, "latentzoom:sampler": f"{arguments.sampler}, {arguments.steps} steps"}
        drawing = model.drawing(latent[None], size, tile=max(latent.shape[-2:]))
        if size[0] * size[1] < LARGE:
            drawing.write(target, Facts(text=origin(name, facts)))
        else:
            with Progress(f"draw seed {seed}", size[0] * size[1], "pixels") as drawn:
                drawing.write(target, Facts(text=origin(name, facts)), drawn.update)
        progress.update(1)
