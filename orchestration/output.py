"""What generate and upscale share: finding the model, reading a size, writing a picture that says its origin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from orchestration import registry
from pipeline.errors import UserError
from pipeline.geometry import Size, check_size
from pipeline.model import LatentZoom


def load_model(uri: str, device: str = "", tracking_uri: str = "") -> tuple[LatentZoom, str]:
    """The model at a bundle folder, URL or models:/ URI, and a text naming exactly this version and its digest."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    store = tracking_uri or None
    folder = registry.resolve(uri, tracking_uri=store)
    model = LatentZoom.load(str(folder), device=device)
    digest = registry.bundle_digest(folder)[:16]
    if not uri.startswith("models:/"):
        return model, f"{model.config.name} sha256:{digest}"
    name, which = registry.parse_model_uri(uri)
    version = registry.get_version(name, which, tracking_uri=store)
    number = version.version if version is not None else which
    return model, f"models:/{name}/{number} sha256:{digest}"


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


def save_png(picture: Image.Image, target: Path, model: str, facts: Mapping[str, object]) -> None:
    """Write a PNG whose text fields name the model version and `facts` (seed, sampler, ...). Never half a file."""
    info = PngInfo()
    info.add_text("Software", "latentzoom")
    info.add_text("latentzoom:model", model)
    for name, value in facts.items():
        info.add_text(name, str(value))
    options: dict[str, object] = {"pnginfo": info}
    if icc := picture.info.get("icc_profile"):
        options["icc_profile"] = icc
    save_atomically(picture, target, "PNG", options)


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
