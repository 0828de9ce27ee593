"""`latentzoom upscale`: enlarge a picture, a folder of pictures or a pipe, by any factor or to any size."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
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
from pipeline.canvas import Facts, check_target, write_png
from pipeline.drawing import Drawing
from pipeline.errors import UserError
from pipeline.geometry import Size
from pipeline.model import LatentZoom, target_size
from pipeline.progress import Progress
from pipeline.reading import Picture, read_picture, use_own_size_limit

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
_PIPE = Path("-")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Enlarge pictures. A folder in gives a folder out; pictures that are there already are kept. Transparency, colour
    profile and EXIF are kept (in TIFF five fields of EXIF). Inputs up to 100 megapixels, outputs of any size: memory
    does not grow with the output."""

    input: tyro.conf.Positional[Path]
    """Picture, folder, or - for standard input."""
    output: tyro.conf.Positional[Path]
    """.png or .tif file (BigTIFF), folder, or - for a PNG on standard output."""
    model: str = ""
    """Bundle folder, URL, or models:/NAME@champion. Without it: the starter, a small model that comes along."""
    look: Annotated[str, tyro.conf.arg(metavar="faithful|sharp")] = ""
    """Of the starter: faithful is closest to the truth (the default), sharp is crisper for the eye."""
    scale: float | None = None
    """Any positive factor, such as 5.3."""
    size: str = ""
    """Height x width instead of a factor."""
    seed: int = 0
    sampler: Literal["dpm++", "ddim"] = "dpm++"
    steps: int | None = None
    """Evaluations of the denoiser (super-resolution models); unless given 20, or 1 of a distilled one. 0 renders the
    input directly, which is fast and closest to the truth pixel by pixel; any other number adds plausible detail by
    diffusion, which looks better at large factors. Models without a denoiser, such as the starter, always do the
    former."""
    eta: float = 0.0
    condition_noise: float = 0.0
    """Noise on the condition, 0 to what the model was trained with (super-resolution models with
    model.denoiser.condition_noise): more detail of its own, less trust in what the input shows."""
    tile: int = 0
    """Side of the tiles, in latent cells, that large pictures are worked on in (default: twice the training size).
    Smaller needs less memory."""
    preview: int = 0
    """Every so many steps, show the picture as it stands in OUTPUT.preview.png."""
    format: Literal["png", "tif"] = "png"
    """Files of an output folder."""
    compile: bool = False
    """Compile the denoiser: slow to start, then faster; pays for many pictures on a GPU."""
    device: Annotated[str, tyro.conf.arg(help="cpu, cuda, cuda:1; default: CUDA where there is one")] = ""
    dtype: Dtype = "float32"
    """Precision of the networks. bfloat16 suits recent GPUs; it changes pixels by a level or two."""
    tracking_uri: str = ""
    """MLflow store for models:/ URIs (default: MLFLOW_TRACKING_URI)."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, prog="latentzoom upscale", args=argv)
    size = parse_size(arguments.size) if arguments.size else None
    if (arguments.scale is None) == (size is None):
        raise UserError("give either --scale or --size")
    if arguments.tile < 0 or arguments.preview < 0:
        raise UserError("--tile and --preview: use 0 or more")
    if arguments.input != _PIPE and not arguments.input.exists():
        raise UserError(f"no such file or folder: {arguments.input}")
    is_folder = arguments.input != _PIPE and arguments.input.is_dir()
    _check_output(arguments, is_folder)
    use_own_size_limit()  # Pillow would warn of pictures that `read_picture` allows
    model, name = load_model(_model(arguments), arguments.device, arguments.tracking_uri, arguments.dtype)
    if arguments.compile:
        model.compile()
    if is_folder:
        return _folder(arguments, model, name, size)
    with _within_memory(arguments.input):
        _one(arguments, model, name, size, arguments.input, arguments.output, is_shown=True)
    if arguments.output != _PIPE:
        print(arguments.output)
    return 0


def _model(arguments: Arguments) -> str:
    if not arguments.model:
        return f"starter:{arguments.look or 'faithful'}"
    if arguments.look:
        raise UserError(f"--look {arguments.look} chooses between the starter's two models; leave it or --model out")
    return arguments.model


def _within_memory(file: Path) -> AbstractContextManager[None]:
    what = "standard input" if file == _PIPE else str(file)
    return within_memory(what, "give a smaller --tile, such as 64 or 32, or --dtype bfloat16")


def _check_output(arguments: Arguments, is_folder: bool) -> None:
    """`UserError` for an output that cannot be, or that would replace what is read."""
    source, output = arguments.input, arguments.output
    if output == _PIPE:
        if is_folder:
            raise UserError("a folder needs a folder to write to, not -")
        return
    if source != _PIPE and output.exists() and output.samefile(source):
        raise UserError(f"{output} is what is read; write to another {'folder' if is_folder else 'file'}")
    if not is_folder:
        check_target(output, (1, 1))
        check_file(output)
    else:
        check_folder(output)


def _folder(arguments: Arguments, model: LatentZoom, name: str, size: Size | None) -> int:
    files = _pictures(arguments)
    if not files:
        raise UserError(f"no pictures in {arguments.input} ({', '.join(sorted(_SUFFIXES))})")
    missing = [(file, target) for file, target in zip(files, _targets(arguments, files)) if not target.exists()]
    failed = 0
    with Progress("upscale", len(files), "images", initial=len(files) - len(missing)) as progress:
        for file, target in missing:
            try:
                with _within_memory(file):
                    _one(arguments, model, name, size, file, target, is_shown=False)
            except UserError as error:
                failed += 1
                print(f"latentzoom: {error}", file=sys.stderr)
            progress.update(1)
    print(arguments.output)
    if failed:
        print(f"latentzoom: {failed} of {len(files)} pictures could not be upscaled", file=sys.stderr)
    return 1 if failed else 0


def _pictures(arguments: Arguments) -> list[Path]:
    """The pictures below the input folder, without those that an earlier run wrote to an output folder inside it."""
    files = sorted(p for p in arguments.input.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    output = arguments.output.absolute()
    return [file for file in files if output not in file.absolute().parents]


def _targets(arguments: Arguments, files: list[Path]) -> list[Path]:
    """Where each file goes. Files that would go to the same place keep their suffix: a.jpg.png beside a.png.png."""
    names = {file: file.with_suffix("") for file in files}
    while True:
        counts = Counter(names.values())
        clashing = [file for file, name in names.items() if counts[name] > 1 and name != file]
        if not clashing:
            break
        names.update((file, file) for file in clashing)
    return [arguments.output / f"{name.relative_to(arguments.input)}.{arguments.format}" for name in names.values()]


def _one(
    arguments: Arguments,
    model: LatentZoom,
    name: str,
    size: Size | None,
    file: Path,
    target: Path,
    *,
    is_shown: bool,
) -> None:
    """One picture. Sampling and drawing show their own progress where `is_shown`."""
    source = _read(file)
    size = target_size(source.size, arguments.scale, size)
    if target != _PIPE:
        check_target(target, size)
    with Previews(model, target, size, arguments.preview if target != _PIPE else 0, is_shown) as previews:
        latent = model.latent_of(
            source,
            seed=arguments.seed,
            sampler=arguments.sampler,
            num_steps=arguments.steps,
            eta=arguments.eta,
            tile=arguments.tile,
            condition_noise=arguments.condition_noise,
            on_step=previews.on_step,
        )
    drawing = model.drawing(latent, size, tile=arguments.tile, alpha=source.opacity(), is_grey=source.is_grey)
    facts = _facts(arguments, name, source, size)
    if not is_shown:
        drawing.write(target, facts)
        return
    with Progress("draw", size[0] * size[1], "pixels") as progress:
        if target == _PIPE:
            _write_to_pipe(drawing, facts, progress.update)
        else:
            drawing.write(target, facts, progress.update)


def _write_to_pipe(drawing: Drawing, facts: Facts, on_pixels: Callable[[int], object]) -> None:
    if sys.stdout is None:
        raise UserError("standard output is closed; write to a file")
    stream = sys.stdout.buffer
    try:
        write_png(stream, drawing.size, drawing.pixels, channels=drawing.channels, facts=facts, on_pixels=on_pixels)
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # or Python tries, and complains, once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"cannot write to standard output: {error.strerror or error}") from error


def _facts(arguments: Arguments, name: str, source: Picture, size: Size) -> Facts:
    factor = f"{size[0] / source.size[0]:.4g}x{size[1] / source.size[1]:.4g}"
    text = origin(name, {"latentzoom:seed": arguments.seed, "latentzoom:scale": factor})
    return Facts(text=text, icc=source.icc, exif=source.exif)


def _read(file: Path) -> Picture:
    if file == _PIPE:
        if sys.stdin is None:
            raise UserError("standard input is closed; give a file")
        return read_picture(sys.stdin.buffer.read(), "standard input")
    return read_picture(file)
