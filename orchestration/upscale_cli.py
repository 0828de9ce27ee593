"""`latentzoom upscale`: enlarge a picture, or a folder of pictures, by any factor or to any size."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL import Image

from orchestration.output import load_model, parse_size, save_png
from pipeline.errors import UserError
from pipeline.geometry import Size
from pipeline.model import LatentZoom
from pipeline.progress import Progress
from preprocess.images import decode
from preprocess.rejects import Reject

MAX_INPUT_PIXELS = 100_000_000
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Enlarge pictures. A folder in gives a folder out; pictures that are there already are kept."""

    input: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    """PNG file, or folder."""
    model: str
    """Bundle folder, URL, or models:/NAME@champion."""
    scale: float | None = None
    """Any positive factor, such as 5.3."""
    size: str = ""
    """Height x width instead of a factor."""
    seed: int = 0
    sampler: Literal["dpm++", "ddim"] = "dpm++"
    steps: int = 20
    """Evaluations of the denoiser (super-resolution models)."""
    eta: float = 0.0
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, cuda:1; default: CUDA where there is one")] = ""
    tracking_uri: str = ""
    """MLflow store for models:/ URIs (default: MLFLOW_TRACKING_URI)."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, prog="latentzoom upscale", args=argv)
    size = parse_size(arguments.size) if arguments.size else None
    if (arguments.scale is None) == (size is None):
        raise UserError("give either --scale or --size")
    if not arguments.input.exists():
        raise UserError(f"no such file or folder: {arguments.input}")
    model, name = load_model(arguments.model, arguments.device, arguments.tracking_uri)
    if arguments.input.is_dir():
        return _folder(arguments, model, name, size)
    _one(arguments, model, name, size, arguments.input, arguments.output)
    print(arguments.output)
    return 0


def _folder(arguments: Arguments, model: LatentZoom, name: str, size: Size | None) -> int:
    files = sorted(p for p in arguments.input.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"no pictures in {arguments.input} ({', '.join(sorted(_SUFFIXES))})")
    failed = 0
    with Progress("upscale", len(files), "images") as progress:
        for file in files:
            target = (arguments.output / file.relative_to(arguments.input)).with_suffix(".png")
            try:
                if not target.exists():
                    _one(arguments, model, name, size, file, target)
            except UserError as error:
                failed += 1
                print(f"latentzoom: {error}", file=sys.stderr)
            progress.update(1)
    print(arguments.output)
    if failed:
        print(f"latentzoom: {failed} of {len(files)} pictures could not be upscaled", file=sys.stderr)
    return 1 if failed else 0


def _one(arguments: Arguments, model: LatentZoom, name: str, size: Size | None, file: Path, target: Path) -> None:
    picture = _open(file)
    enlarged = model.upscale(
        picture,
        arguments.scale,
        size=size,
        seed=arguments.seed,
        sampler=arguments.sampler,
        num_steps=arguments.steps,
        eta=arguments.eta,
    )
    factor = f"{enlarged.height / picture.height:.4g}x{enlarged.width / picture.width:.4g}"
    save_png(enlarged, target, name, {"latentzoom:seed": arguments.seed, "latentzoom:scale": factor})


def _open(file: Path) -> Image.Image:
    try:
        return decode(file.read_bytes(), MAX_INPUT_PIXELS)
    except Reject as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
