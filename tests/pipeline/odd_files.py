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


def packed_tiff(
    values: np.ndarray, bits: int, photometric: int, *, order: str = "<", compression: int = 1, planar: int = 1,
    rows: int = 17, tile: tuple[int, int] | None = None, fill: int = 1,
    tags: dict[int, tuple[str, list[int]]] | None = None,
) -> bytes:  # fmt: skip
    """A TIFF of `values` (H,W,C) with any number of bits, in strips or tiles, by pixels or by planes. compression: 1
    none, 5 LZW (without ever saving a byte), 8 deflate, 32773 PackBits."""
    height, width, channels = values.shape
    step_y, step_x = tile or (rows, width)
    parts = []
    for plane in [values] if planar == 1 else [values[..., c : c + 1] for c in range(channels)]:
        for y in range(0, height, step_y):
            for x in range(0, width, step_x):
                part = plane[y : y + step_y, x : x + step_x]
                if tile:
                    part = np.pad(part, ((0, step_y - part.shape[0]), (0, step_x - part.shape[1]), (0, 0)))
                flat = part.reshape(part.shape[0], -1)
                if bits == 16:
                    data = flat.astype(f"{order}u2").tobytes()
                else:
                    cells = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
                    data = np.packbits(cells.reshape(len(flat), -1).astype(np.uint8), axis=1).tobytes()
                if compression == 8:
                    data = zlib.compress(data)
                elif compression == 5:
                    runs = [[256, *data[i : i + 200]] for i in range(0, len(data), 200)]  # 256: forget all; 257: end
                    codes = np.array([code for run in [*runs, [257]] for code in run])
                    data = np.packbits((codes[:, None] >> np.arange(8, -1, -1)) & 1).tobytes()
                elif compression == 32773:
                    data = b"".join(bytes([len(data[i : i + 128]) - 1]) + data[i : i + 128]
                                    for i in range(0, len(data), 128))  # fmt: skip
                if fill == 2:
                    data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
                parts.append(data)
    places = [8 + sum(len(part) for part in parts[:n]) for n in range(len(parts))]
    entries: dict[int, tuple[str, list[int]]] = {
        256: ("H", [width]), 257: ("H", [height]), 258: ("H", [bits] * channels), 259: ("H", [compression]),
        262: ("H", [photometric]), 266: ("H", [fill]), 277: ("H", [channels]), 284: ("H", [planar]), **(tags or {}),
    }  # fmt: skip
    names = (324, 325) if tile else (273, 279)
    entries |= {names[0]: ("I", places), names[1]: ("I", [len(part) for part in parts])}
    entries |= {322: ("H", [step_x]), 323: ("H", [step_y])} if tile else {278: ("H", [rows])}
    directory, outside = struct.pack(order + "H", len(entries)), b""
    start = 8 + sum(map(len, parts))
    end = start + 2 + 12 * len(entries) + 4
    for tag, (kind, numbers) in sorted(entries.items()):
        body = struct.pack(order + kind * len(numbers), *numbers)
        directory += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(numbers))
        directory += body.ljust(4, b"\0") if len(body) <= 4 else struct.pack(order + "I", end + len(outside))
        outside += body if len(body) > 4 else b""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", start)
    return head + b"".join(parts) + directory + bytes(4) + outside
