"""What generate and upscale share: the model, sizes, previews, and pictures that say their origin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from orchestration import registry
from pipeline.allocator import keep_freed_memory
from pipeline.device import checked_device
from pipeline.errors import UserError
from pipeline.geometry import Size, check_size
from pipeline.model import LatentZoom
from pipeline.progress import Progress

Dtype = Literal["float32", "bfloat16", "float16"]


def load_model(uri: str, device: str = "", tracking_uri: str = "", dtype: Dtype = "float32") -> tuple[LatentZoom, str]:
    """The model at a bundle folder, URL or models:/ URI, and a text naming exactly this version and its digest."""
    device = str(checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    keep_freed_memory()
    store = tracking_uri or None
    folder = registry.resolve(uri, tracking_uri=store)
    model = LatentZoom.load(str(folder), device=device, dtype=getattr(torch, dtype))
    digest = registry.bundle_digest(folder)[:16]
    if not uri.startswith("models:/"):
        return model, f"{model.config.name} sha256:{digest}"
    name, which = registry.parse_model_uri(uri)
    version = registry.get_version(name, which, tracking_uri=store)
    number = version.version if version is not None else which
    return model, f"models:/{name}/{number} sha256:{digest}"


def check_file(target: Path) -> None:
    """`UserError` where the file surely cannot be written: better said before the work than after it."""
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder")
    check_folder(target.absolute().parent, target)


def check_folder(folder: Path, target: Path | None = None) -> None:
    """As `check_file`, for any file (or `target`) in a folder that need not be there yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"cannot write {target or folder}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write {target or folder}: no permission for {there}")


@contextlib.contextmanager
def within_memory(what: str, todo: str) -> Iterator[None]:
    """Where the GPU's memory does not suffice for `what`, a `UserError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what}: the GPU has too little memory for it; {todo}") from error


def parse_size(text: str) -> Size:
    """ "700x1000" → (700, 1000), "256" → (256, 256): height before width. Raises `UserError`."""
    parts = text.lower().replace("×", "x").split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UserError(f"size {text!r} is not allowed; use height x width, such as 700x1000")
    return check_size((numbers[0], numbers[-1]))


def origin(model: str, facts: Mapping[str, object]) -> dict[str, str]:
    """Text fields that name the model version and `facts` (seed, sampler, ...)."""
    return {"Software": "latentzoom", "latentzoom:model": model, **{name: str(fact) for name, fact in facts.items()}}


def save_atomically(picture: Image.Image, target: Path, form: str, options: Mapping[str, object]) -> None:
    """Write beside `target` and rename. Raises `UserError` when the folder cannot be written."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(temporary, form, **options)
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


PREVIEW_SIDE = 512
"""Largest height and width of a preview, in pixels."""


class Previews:
    """What sampling shows on its way: progress, and every `every` steps the picture as the denoiser sees it by then, in
    TARGET.preview.png. The preview goes when the block ends. `every` 0 draws none."""

    def __init__(self, model: LatentZoom, target: Path, size: Size, every: int, is_shown: bool = True) -> None:
        self.model, self.every, self.is_shown = model, every, is_shown
        reduction = max(1.0, max(size) / PREVIEW_SIDE)
        self.size: Size = (max(1, round(size[0] / reduction)), max(1, round(size[1] / reduction)))
        self.file = target.with_suffix(".preview.png")
        self._progress: Progress | None = None

    def __enter__(self) -> Previews:
        return self

    def on_step(self, done: int, total: int, x0_pred: Tensor) -> None:
        """For the samplers: x0_pred (B,C,h,w) is scaled; the first picture of the batch is shown."""
        if self.is_shown and self._progress is None:
            self._progress = Progress("sample", total, "steps")
        if self._progress is not None:
            self._progress.update(1)
        if self.every and done % self.every == 0 and done < total:
            latent = x0_pred[:1] / self.model.config.scale_factor
            picture = self.model.drawing(latent, self.size).picture()
            save_atomically(picture, self.file, "PNG", {})

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()
        if self.every:
            self.file.unlink(missing_ok=True)
