"""What generate and upscale share: the model, sizes, previews, and pictures that say their origin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from orchestration.registry import versions as registry
from pipeline.beside import replacing
from pipeline.canvas import Facts, read_text
from pipeline.device import checked_device
from pipeline.errors import UserError
from pipeline.geometry import Size
from pipeline.model import LatentZoom
from pipeline.progress import Progress

Dtype = Literal["float32", "bfloat16", "float16"]


def load_model(uri: str, device: str = "", tracking_uri: str = "", dtype: Dtype = "float32") -> tuple[LatentZoom, str]:
    """The model at a bundle folder, URL or models:/ URI, and a text naming exactly this version and its digest."""
    device = str(checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
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


def slow_dtype(device: str, dtype: Dtype) -> str:
    """A line to say where a precision is no gain but a great loss; "" otherwise."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind != "cpu" or dtype != "bfloat16" or _cpu_has("avx512_bf16", "amx_bf16", "bf16"):
        return ""
    return "this CPU has no bfloat16 instructions: it is about ten times slower here than float32, the default"


def _cpu_has(*flags: str) -> bool:
    """Whether the processor has one of these instructions, as far as the system tells."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    lines = (line.partition(":")[2].split() for line in told.splitlines() if line.startswith(("flags", "Features")))
    return bool(set(flags) & set(next(lines, flags)))


@contextlib.contextmanager
def within_memory(what: str, todo: str) -> Iterator[None]:
    """Where the GPU's memory does not suffice for `what`, a `UserError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what}: the GPU has too little memory for it; {todo}") from error


def origin(model: str, facts: Mapping[str, object]) -> dict[str, str]:
    """Text fields that name the model version and `facts` (seed, sampler, ...)."""
    return {"Software": "latentzoom", "latentzoom:model": model, **{name: str(fact) for name, fact in facts.items()}}


def save_atomically(picture: Image.Image, target: Path, form: str, options: Mapping[str, object]) -> None:
    """Write beside `target` and rename. Raises `UserError` when the folder cannot be written."""
    try:
        with replacing(target) as stream:
            picture.save(stream, form, **options)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


_PREVIEW = "latentzoom:preview"
"""Text by which a preview says what it is: anything else in its place is a person's picture."""
PREVIEW_SIDE = 512
"""Largest height and width of a preview, in pixels."""


class Previews:
    """What a picture shows on its way to its latent: progress, and every `every` steps the picture as the denoiser sees
    it by then, in TARGET.preview.png. The preview goes when the block ends. `every` 0 draws none. encodes: a picture is
    encoded first. num_steps: of the denoiser, 0 where there is none."""

    def __init__(
        self,
        model: LatentZoom,
        target: Path,
        size: Size,
        every: int,
        is_shown: bool = True,
        *,
        encodes: bool = False,
        num_steps: int = 0,
    ) -> None:
        self.model, self.every, self.is_shown = model, every, is_shown
        self.encodes, self.num_steps = encodes, num_steps
        reduction = max(1.0, max(size) / PREVIEW_SIDE)
        self.size: Size = (max(1, round(size[0] / reduction)), max(1, round(size[1] / reduction)))
        self.file = target.with_suffix(".preview.png")
        if every and self.file.exists() and _PREVIEW not in read_text(self.file):
            raise UserError(
                f"{self.file} is there already, where the preview would go; move it, or leave --preview out"
            )
        self._progress: Progress | None = None

    def __enter__(self) -> Previews:
        if self.encodes:
            self._begin("encode", None, "tiles")
        elif self.num_steps:
            self._begin("sample", self.num_steps, "steps")
        return self

    def _begin(self, label: str, total: int | None, unit: str) -> None:
        if self._progress is not None:
            self._progress.close()
        self._progress = Progress(label, total, unit, is_ticking=True) if self.is_shown else None

    def on_tile(self, done: int, total: int) -> None:
        """For `LatentZoom.latent_of`: tiles of the input that are encoded."""
        if self._progress is not None:
            self._progress.total = total
            self._progress.update(1)
            if done == total and self.num_steps:
                self._begin("sample", self.num_steps, "steps")

    def on_step(self, done: int, total: int, x0_pred: Tensor) -> None:
        """For the samplers: x0_pred (B,C,h,w) is scaled; the first picture of the batch is shown."""
        if self._progress is not None:
            self._progress.update(1)
        if self.every and done % self.every == 0 and done < total:
            latent = x0_pred[:1] / self.model.config.scale_factor
            self.model.drawing(latent, self.size).write(self.file, Facts(text=origin("", {_PREVIEW: done})))

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()
        if self.every:
            self.file.unlink(missing_ok=True)
