"""Files that readers get wrong, made byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import skimage.data
import tifffile
from PIL import Image

ORIENTATION_6 = (0x112, 3, 1, struct.pack("<H", 6))
RESOLUTION_AS_TEXT = (0x11A, 2, 3, b"72\0")
"""Pillow reads this tag and cannot write it."""


def photo(height: int = 60, width: int = 90) -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((width, height))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif_block(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """From (tag, type, count, value bytes of at most 4); little endian."""
    body = struct.pack("<H", len(entries))
    for tag, kind, count, value in sorted(entries):
        body += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", 0)


def chunk(kind: bytes, body: bytes, *, is_good: bool = True) -> bytes:
    checksum = zlib.crc32(kind + body) ^ (0 if is_good else 1)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def with_chunk(png: bytes, extra: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return png[:33] + extra + png[33:]


def grey_png(values: np.ndarray, depth: int, clear: int | None = None) -> bytes:
    """A grey PNG of 1, 2, 4, 8 or 16 bits from the stored values (H,W); clear: the transparent one."""
    height, width = values.shape
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))]
    parts += [chunk(b"tRNS", struct.pack(">H", clear))] if clear is not None else []
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()
