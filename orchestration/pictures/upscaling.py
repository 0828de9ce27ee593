"""The work of `latentzoom upscale`: each picture read, enlarged and written, and what exists already kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestration.pictures import made_before
from orchestration.pictures.output import Previews, load_model, origin, slow_dtype, within_memory
from orchestration.pictures.places import PIPE, Places, Task
from orchestration.pictures.upscale_arguments import Arguments
from pipeline import storage
from pipeline.beside import hidden
from pipeline.canvas import Facts, read_text, write_png
from pipeline.common_options import answer, now, out
from pipeline.drawing import Drawing
from pipeline.errors import UserError
from pipeline.formats import JPEG, format_of
from pipeline.kept import Keep, KeptPieces, drop, keep_nothing, keep_pixels
from pipeline.model import LatentZoom
from pipeline.progress import Notice, Progress
from pipeline.reading import MAX_INPUT_PIXELS, Picture, Unreadable, oriented_size, read_picture, use_own_size_limit
from pipeline.sizes import Size
from pipeline.storage import cache_folder

LARGE_OUTPUT, LARGE_DIFFUSED = 1 << 22, 1 << 18
"""Pixels of an output, or of an input that is diffused, from which the tiles of a picture are kept until it is done."""


@dataclass(frozen=True, kw_only=True)
class Upscaler:
    """A model and how it shall be used. name: says exactly which model it is."""

    arguments: Arguments
    model: LatentZoom
    name: str

    @property
    def is_diffused(self) -> bool:
        return not self.model.renders_condition(self.arguments.steps)

    @property
    def num_steps(self) -> int:
        """Evaluations of the denoiser for each picture."""
        return self.model.evaluations(self.arguments.steps) if self.is_diffused else 0

    def text(self, data: bytes, source: Size, target: str) -> dict[str, str]:
        """What the result says of itself: all that its pixels depend on. data: the input file."""
        a, size = self.arguments, self.arguments.wanted.of(source)
        facts: dict[str, object] = {
            "input": f"sha256:{hashlib.sha256(data).hexdigest()[:16]}",
            "size": f"{size[0]}x{size[1]}",
            "scale": f"{size[0] / source[0]:.4g}x{size[1] / source[1]:.4g}",
            "dtype": a.dtype,
        }
        if self.is_diffused:
            eta = f", eta {a.eta:g}" if a.sampler == "ddim" else ""
            facts |= {"seed": a.seed, "sampler": f"{a.sampler}, {self.num_steps} steps{eta}"}
        if a.condition_noise:
            facts["condition_noise"] = f"{a.condition_noise:g}"
        decoder = self.model.decoder
        if a.tile and (self.is_diffused or decoder is None or decoder.trunk.halo is None):
            facts["tile"] = a.tile  # others give the same whatever their tiles are
        if target != PIPE and format_of(target).is_lossy:
            facts["quality"] = a.quality
        return origin(self.name, {f"latentzoom:{key}": value for key, value in facts.items()})

    def text_of(self, task: Task) -> dict[str, str]:
        """The same for a picture that is not read yet; {} where it cannot be."""
        try:
            data = _bytes_of(task.source)
            return self.text(data, _size_of(data), task.target)
        except UserError:
            return {}


def run(arguments: Arguments, found: Places, notice: Notice) -> int:
    """Everything that `found` names; the notice is of the model's loading. Exit status 1: some pictures could not be
    enlarged."""
    _drained.cache_clear()
    use_own_size_limit()  # Pillow would warn of pictures that `read_picture` allows
    if not found.is_said:
        _check_meant(found.tasks[0])
    model, name = load_model(arguments.model_address, arguments.device, arguments.tracking_uri, arguments.dtype)
    notice.over()
    if line := slow_dtype(arguments.device, arguments.dtype):
        print(f"latentzoom: {line}", file=sys.stderr)
    if arguments.compile:
        model.compile()
    upscaler = Upscaler(arguments=arguments, model=model, name=name)
    with_files = [task for task in found.tasks if task.target != PIPE]
    wanted = [(task.target, lambda task=task: upscaler.text_of(task)) for task in with_files]
    missing = [with_files[index] for index in made_before.todo(wanted, overwrite=arguments.overwrite)]
    if found.is_folder:
        return _several(upscaler, found, missing)
    for task in missing or [task for task in found.tasks if task.target == PIPE]:
        _enlarge(upscaler, task, is_shown=True)
    if found.output != PIPE:
        text = found.output if missing else f"{found.output} is there already, made by this very command"
        answer(text, _outcome(found, len(missing), 0))
    return 0


def _outcome(found: Places, made: int, failed: int) -> dict[str, object]:
    return {"out": found.output, "files": [task.target for task in found.tasks], "made": made, "failed": failed}


def _check_meant(task: Task) -> None:
    """A file at the end of the command line that is there already is the output only where it was before."""
    if task.source == PIPE:
        return
    digest = hashlib.sha256(_bytes_of(task.source)).hexdigest()[:16]
    if read_text(task.target).get(made_before.INPUT) != f"sha256:{digest}":
        raise UserError(
            f"{task.target} is a picture that is there and was not made of {task.source}; if both are inputs, give a "
            f"folder at the end (out/), and if it shall be replaced, say so: -o {task.target} --overwrite"
        )


def _several(upscaler: Upscaler, found: Places, missing: list[Task]) -> int:
    failed = 0
    num = len(found.tasks)
    with Progress("upscale", num, "images", initial=num - len(missing), is_ticking=True) as progress:
        for task in missing:
            progress.note = task.source
            try:
                _enlarge(upscaler, task, is_shown=False)
            except UserError as error:
                failed += 1
                print(f"latentzoom: {error}", file=sys.stderr)
            progress.update(1)
    answer(found.output, _outcome(found, len(missing) - failed, failed))
    if failed:
        print(f"latentzoom: {failed} of {num} pictures could not be upscaled", file=sys.stderr)
    return 1 if failed else 0


def _enlarge(upscaler: Upscaler, task: Task, *, is_shown: bool) -> None:
    """One picture. Encoding, sampling and drawing show their own progress where `is_shown`."""
    what = "standard input" if task.source == PIPE else task.source
    with within_memory(what, "give a smaller --tile, such as 64 or 32, or --dtype bfloat16"):
        data = _bytes_of(task.source)
        picture = read_picture(data, what)
        size = upscaler.arguments.wanted.of(picture.size)
        _notices(picture, task, size)
        facts = Facts(text=upscaler.text(data, picture.size, task.target), icc=picture.icc, exif=picture.exif)
        pieces = _pieces(upscaler, task, picture, size, facts)
        with _saying_what_is_kept(pieces, is_shown):
            drawing = _drawing(upscaler, task, picture, size, pieces or keep_nothing, is_shown)
            _write(drawing, task.target, facts, upscaler.arguments.quality, pieces, is_shown)
        if pieces is not None:
            pieces.remove()


def _notices(picture: Picture, task: Task, size: Size) -> None:
    form = None if task.target == PIPE else format_of(task.target, size)
    if picture.has_more:
        print(f"latentzoom: {task.source} has several frames or pages; only the first is enlarged", file=sys.stderr)
    if form is JPEG and picture.alpha is not None:
        print(
            f"latentzoom: {task.source} is transparent and JPEG cannot be: what shows is laid over white; "
            "PNG, WebP, AVIF and TIFF keep it",
            file=sys.stderr,
        )


def _pieces(upscaler: Upscaler, task: Task, picture: Picture, size: Size, facts: Facts) -> KeptPieces | None:
    """For a large picture that goes to a file or URL: where its finished tiles are kept until it is done, beside the
    file or in the cache."""
    if task.target == PIPE:
        return None
    if "://" in task.target:
        folder = cache_folder() / "parts" / hashlib.sha256(task.target.encode()).hexdigest()[:16]
    else:
        folder = hidden(Path(task.target), "parts")
    num_input = picture.size[0] * picture.size[1]
    if size[0] * size[1] < LARGE_OUTPUT and not (upscaler.is_diffused and num_input >= LARGE_DIFFUSED):
        drop(folder)  # of other work that was to become this file
        return None
    device = upscaler.model.device.type
    key = {**facts.text, "tile": str(upscaler.arguments.tile), "device": device, "torch": str(torch.__version__)}
    return KeptPieces(folder, key)


@contextlib.contextmanager
def _saying_what_is_kept(pieces: KeptPieces | None, is_alone: bool) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if not is_alone:
            raise KeyboardInterrupt(
                "what is finished is kept; run the same command again to continue with the others"
            ) from None
        num = 0 if pieces is None else pieces.num_found + pieces.num_made
        if pieces is None or not num:
            if pieces is not None:
                pieces.remove()
            raise KeyboardInterrupt("nothing of this picture was kept, so the same command starts it again") from None
        raise KeyboardInterrupt(
            f"{num} finished tiles are kept in {pieces.folder}; run the same command again to continue"
        ) from None


def _drawing(upscaler: Upscaler, task: Task, picture: Picture, size: Size, keep: Keep, is_shown: bool) -> Drawing:
    a, model = upscaler.arguments, upscaler.model
    previews = Previews(
        model,
        Path(task.target),
        size,
        0 if task.target == PIPE or "://" in task.target else a.preview,
        is_shown,
        encodes=True,
        num_steps=upscaler.num_steps,
    )
    with previews:
        latent = model.latent_of(
            picture,
            seed=a.seed,
            sampler=a.sampler,
            num_steps=a.steps,
            eta=a.eta,
            tile=a.tile,
            condition_noise=a.condition_noise,
            on_step=previews.on_step,
            on_tile=previews.on_tile,
            keep=keep,
        )
    return model.drawing_of(picture, latent, size, tile=a.tile)


def _write(
    drawing: Drawing, target: str, facts: Facts, quality: int, pieces: KeptPieces | None, is_shown: bool
) -> None:
    draw = drawing.pixels if pieces is None else keep_pixels(pieces, drawing.pixels)
    num_pixels = drawing.size[0] * drawing.size[1]
    with contextlib.ExitStack() as stack:
        on_pixels: Callable[[int], object] | None = None
        if is_shown:
            on_pixels = stack.enter_context(Progress("draw", num_pixels, "pixels", is_ticking=True)).update
        if target == PIPE:
            _write_to_pipe(drawing, facts, on_pixels)
        elif "://" in target:
            with tempfile.TemporaryDirectory(prefix="latentzoom-") as folder:
                file = Path(folder) / target.rsplit("/", 1)[-1]
                drawing.write(file, facts, on_pixels, quality=quality, draw=draw)
                storage.publish_file(file, target)
        else:
            drawing.write(Path(target), facts, on_pixels, quality=quality, draw=draw)


def _write_to_pipe(drawing: Drawing, facts: Facts, on_pixels: Callable[[int], object] | None) -> None:
    if sys.__stdout__ is None:
        raise UserError("standard output is closed; write to a file")
    if now().json:
        raise UserError("--json and a picture on standard output contradict; write to a file, or leave --json out")
    stream = out().buffer
    try:
        write_png(stream, drawing.size, drawing.pixels, channels=drawing.channels, facts=facts, on_pixels=on_pixels)
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # or Python tries, and complains, once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), out().fileno())
        raise UserError(f"cannot write to standard output: {error.strerror or error}") from error


def _size_of(data: bytes) -> Size:
    """(H, W) of a picture, from its header where that says it."""
    try:
        return oriented_size(data, MAX_INPUT_PIXELS)
    except Unreadable:  # or of a layout whose header Pillow does not understand
        return read_picture(data).size


@functools.cache
def _drained(source: str) -> bytes:
    """What a pipe gives, which it gives once."""
    if source != PIPE:
        return Path(source).read_bytes()
    if sys.stdin is None:
        raise UserError("standard input is closed; give a file")
    return sys.stdin.buffer.read()


def _bytes_of(source: str) -> bytes:
    if "://" in source:
        return storage.read_bytes(source)
    try:
        if source == PIPE or Path(source).is_fifo():
            return _drained(source)
        return Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error
