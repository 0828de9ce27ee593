"""Pictures for the shards: read as everywhere (`pipeline.reading`), shown over white in sRGB, cropped and stored."""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL import Image

from pipeline import reading
from pipeline.reading import use_own_size_limit
from preprocess.pictures.crops import Box
from preprocess.rejects import Reject

__all__ = ["crop_and_resize", "decode", "decode_stored", "encode_pixels", "oriented_size", "use_own_size_limit"]

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def oriented_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) as shown, from the header alone. Raises `Reject`."""
    try:
        return reading.oriented_size(data, max_pixels)
    except reading.Unreadable as error:
        raise Reject(error.reason, error.detail) from error


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """An RGB image as a viewer shows it. Raises `Reject`: empty, not_an_image, damaged, too_large, unsupported."""
    try:
        return reading.decode(data, max_pixels).shown()
    except reading.Unreadable as error:
        raise Reject(error.reason, error.detail) from error


def crop_and_resize(image: Image.Image, box: Box, size: int, resize: str) -> Image.Image:
    """The square `box` of an RGB image at size × size, anti-aliased."""
    top, left, bottom, right = box
    if (bottom - top, right - left) == (size, size):
        return image.crop((left, top, right, bottom))
    return image.resize((size, size), _FILTERS[resize], box=(left, top, right, bottom), reducing_gap=3.0)


def encode_pixels(image: Image.Image, pixel_format: str) -> bytes:
    """The bytes of a stored sample. Plain settings: the same picture gives the same bytes. PNG looks for runs only: for
    photographs that is a third faster than level 3 of all matches, and 5 % smaller."""
    buffer = io.BytesIO()
    if pixel_format == "png":
        image.save(buffer, "PNG", compress_level=3, compress_type=zlib.Z_RLE)
    elif pixel_format == "webp":
        image.save(buffer, "WEBP", lossless=True, quality=40, method=2)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode_stored(data: bytes) -> np.ndarray:
    """Stored sample bytes → uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return np.asarray(image.convert("RGB") if image.mode != "RGB" else image)
