"""Pixels as bytes for a browser."""

from __future__ import annotations

import io

from PIL import Image

from pipeline.canvas import Pixels

_TYPES = {"png": "image/png", "tif": "image/tiff", "jpg": "image/jpeg", "webp": "image/webp", "avif": "image/avif"}


def encoded(pixels: Pixels) -> bytes:
    """A PNG, lightly compressed: a tile is sent once and seen at once."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def media_type(suffix: str) -> str:
    return _TYPES[suffix]
