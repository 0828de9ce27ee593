"""What people call a picture, as a `Picture`: a file's bytes, a path or URL, a Pillow image, an array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from pipeline import storage
from pipeline.errors import UserError, first_line
from pipeline.reading.decode import decode, picture_of
from pipeline.reading.exif import upright_block
from pipeline.reading.header import DECODE_ERRORS, Unreadable, check_pixels, detail
from pipeline.reading.picture import Picture

MAX_INPUT_PIXELS = 100_000_000

PictureSource = Picture | Image.Image | Path | str | bytes | Any
"""Any is an open binary file, or an array of uint8: (H,W) grey, or (H,W,C) with C 1 (grey), 2 (grey, alpha), 3 (RGB) or
4 (RGBA)."""


def read_picture(source: PictureSource, name: str = "", max_pixels: int = MAX_INPUT_PIXELS) -> Picture:
    """Raises `UserError` naming the picture when it cannot be read or has more than `max_pixels`. name: what to call
    it, by default its path."""
    if isinstance(source, Picture):
        return source
    if isinstance(source, (str, Path)):
        name = name or str(source)
        source = storage.read_bytes(source) if isinstance(source, str) else _read_file(source)
    name = name or "the picture"
    if isinstance(source, (bytearray, memoryview)):
        source = bytes(source)
    elif hasattr(source, "read") and not isinstance(source, Image.Image):
        source = _read_open(source)
    try:
        if isinstance(source, bytes):
            return decode(source, max_pixels)
        if isinstance(source, Image.Image):
            return _of_pillow(source, max_pixels)
        return _of_array(source, max_pixels)
    except Unreadable as error:
        raise UserError(f"{name} cannot be read as a picture: {error}") from error


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _read_open(file: Any) -> Any:
    """The whole of an open file, wherever it stands, as Pillow reads it."""
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        return file.read()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {getattr(file, 'name', type(file).__name__)}: {first_line(error)}") from error


def _of_pillow(image: Image.Image, max_pixels: int) -> Picture:
    """A picture that Pillow has opened and not yet decoded is read from its file, with all care."""
    data = _undecoded(image)
    if data:
        return decode(data, max_pixels)
    check_pixels(image.height, image.width, max_pixels)
    try:
        image.load()
    except DECODE_ERRORS as error:
        raise Unreadable("damaged", detail(error)) from error
    return picture_of(image, upright_block(image, lambda: image))


def _undecoded(image: Image.Image) -> bytes:
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None or image.tell() != 0:
        return b""
    if getattr(image, "decoderconfig", ()):  # asked to decode smaller: that is what is wanted
        return b""
    try:
        place = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(place)
    except (OSError, ValueError, AttributeError):
        return b""
    return data


def _of_array(source: Any, max_pixels: int) -> Picture:
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot read {type(source).__name__} as a picture; {_ALLOWED}") from error
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    is_picture = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (2, 3, 4))
    if array.dtype != np.uint8 or not is_picture:
        kind = f"an array of {array.dtype} {array.shape}" if array.ndim else type(source).__name__
        raise UserError(f"cannot read {kind} as a picture; {_ALLOWED}")
    check_pixels(array.shape[0], array.shape[1], max_pixels)
    return picture_of(Image.fromarray(np.ascontiguousarray(array)), None)


_ALLOWED = "give a file, its bytes, a Pillow image, or an array of uint8, (H, W) or (H, W, 1 to 4)"
