"""`latentzoom generate`: draw new images from any bundle or registered model, at any height × width."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from orchestration.output import load_model, parse_size, save_png
from pipeline.errors import UserError
from pipeline.progress import Progress


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
    """Folder for the PNG files, or one .png file with --num 1."""
    sampler: Literal["dpm++", "ddim"] = "dpm++"
    steps: int = 20
    """Evaluations of the denoiser."""
    eta: float = 0.0
    """Noise added by DDIM, 0 to 1."""
    latent_size: str = ""
    """Latent cells, such as 64x96, for another shape of scene (default: the training size)."""
    batch: int = 8
    """Images drawn together."""
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, cuda:1; default: CUDA where there is one")] = ""
    tracking_uri: str = ""
    """MLflow store for models:/ URIs (default: MLFLOW_TRACKING_URI)."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, prog="latentzoom generate", args=argv)
    if arguments.num < 1 or arguments.batch < 1:
        raise UserError(f"--num {arguments.num} --batch {arguments.batch}: use at least 1")
    single = arguments.out.suffix.lower() == ".png"
    if single and arguments.num > 1:
        raise UserError(f"--out {arguments.out} is one file and --num {arguments.num} needs a folder")
    model, name = load_model(arguments.model, arguments.device, arguments.tracking_uri)
    if model.config.task == "sr":
        raise UserError(f"{arguments.model} is a super-resolution model; use `latentzoom upscale`")
    size = parse_size(arguments.size) if arguments.size else (model.config.image_size,) * 2
    latent_size = parse_size(arguments.latent_size) if arguments.latent_size else None
    with Progress("generate", arguments.num, "images") as progress:
        for start in range(0, arguments.num, arguments.batch):
            num = min(arguments.batch, arguments.num - start)
            pictures = model.generate(
                num,
                size,
                arguments.seed + start,
                sampler=arguments.sampler,
                num_steps=arguments.steps,
                eta=arguments.eta,
                latent_size=latent_size,
                batch_size=num,
            )
            for i, picture in enumerate(pictures):
                seed = arguments.seed + start + i
                target = arguments.out if single else arguments.out / f"seed-{seed:06d}-{size[0]}x{size[1]}.png"
                facts = {"latentzoom:seed": seed, "latentzoom:sampler": f"{arguments.sampler}, {arguments.steps} steps"}
                save_png(picture, target, name, facts)
                progress.update(1)
    print(arguments.out)
    return 0
