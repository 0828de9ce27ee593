"""The values of a TIFF page whatever their layout: any number of bits up to 16, strips or tiles, pixels or planes.

tifffile finds where the parts (strips or tiles) lie; zlib or libtiff unpacks them (one at a time, as if each were
a grey picture of bytes); what remains is to cut the bytes into values. Legend: H/W pixels, C channels.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS, _COMPRESSION, _FILL_ORDER, _PLANAR, _PREDICTOR = 258, 259, 266, 284, 317
_SEPARATE, _REVERSED, _DIFFERENCES = 2, 2, 2
_PLAIN, _LZW, _PACKBITS, _DEFLATE = 1, 5, 32773, (8, 32946)
_MAX_CHANNELS = 64
_MAX_PADDING = 1 << 24
_REVERSE = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class UnknownLayout(ValueError):
    """Values that are packed in a way that is not known here."""


def read_values(page: Any, data: bytes) -> NDArray[np.uint16]:
    """(H,W,C) of a tifffile page of the file `data`. Raises `UnknownLayout`, `OSError` or `ValueError` for parts that
    are damaged or missing."""
    tags = {tag.code: tag.value for tag in page.tags.values()}
    depths = tags.get(_BITS, 1)
    bits = depths if isinstance(depths, int) else depths[0]
    compression, predictor = int(tags.get(_COMPRESSION, _PLAIN)), tags.get(_PREDICTOR, 1)
    is_known = compression in (_PLAIN, _LZW, _PACKBITS, *_DEFLATE) and page.imagedepth == 1 and 1 <= bits <= 16
    if not is_known or (not isinstance(depths, int) and len(set(depths)) > 1):
        raise UnknownLayout
    if predictor != 1 and (predictor != _DIFFERENCES or bits not in (8, 16) or compression == _PLAIN):
        raise UnknownLayout
    height, width, channels = page.imagelength, page.imagewidth, page.samplesperpixel
    if not 1 <= channels <= _MAX_CHANNELS:
        raise UnknownLayout
    num_planes = channels if tags.get(_PLANAR, 1) == _SEPARATE else 1
    depth = channels // num_planes
    part_width = page.tilewidth if page.is_tiled else width
    part_height = page.tilelength if page.is_tiled else min(page.rowsperstrip or height, height)
    across, down = -(-width // max(part_width, 1)), -(-height // max(part_height, 1))
    if part_width * part_height > 4 * (width + 1024) * (height + 1024) or not part_width or not part_height:
        raise UnknownLayout
    if min(len(page.dataoffsets), len(page.databytecounts)) < num_planes * across * down:
        raise ValueError("parts are missing")
    values = np.zeros((height, width, channels), np.uint16)
    row_bytes = -(-part_width * depth * bits // 8)
    for number in range(num_planes * across * down):
        plane, place = divmod(number, across * down)
        top, left = place // across * part_height, place % across * part_width
        rows = part_height if page.is_tiled else min(part_height, height - top)
        start, length = page.dataoffsets[number], page.databytecounts[number]
        raw = data[start : start + length]
        if tags.get(_FILL_ORDER) == _REVERSED:
            raw = raw.translate(_REVERSE)
        plain = raw if compression == _PLAIN else _unpacked(raw, compression, row_bytes, rows)
        if len(raw) < length or len(plain) < row_bytes * rows:
            raise ValueError("the file ends before its pixels do")
        bytes_of = np.frombuffer(plain, np.uint8, row_bytes * rows).reshape(rows, row_bytes)
        part = _cut(bytes_of, bits, part_width * depth, page.parent.byteorder).reshape(rows, part_width, depth)
        if predictor == _DIFFERENCES:
            part = np.cumsum(part, axis=1, dtype=np.uint16) & np.uint16((1 << bits) - 1)
        here = values[top : top + rows, left : left + part_width, plane * depth : (plane + 1) * depth]
        here[:] = part[: here.shape[0], : here.shape[1]]
    return values


def _unpacked(raw: bytes, compression: int, width: int, height: int) -> bytes:
    """The bytes of one part. LZW and PackBits: read as a TIFF that holds nothing but this part, in 8-bit grey."""
    if compression in _DEFLATE:  # to the checksum at its end, which libtiff leaves alone
        unpack = zlib.decompressobj()
        plain = unpack.decompress(raw, width * height)
        unpack.decompress(unpack.unconsumed_tail, _MAX_PADDING)
        return plain
    entries = ((256, width), (257, height), (258, 8), (259, compression), (262, 1), (273, 8), (277, 1), (278, height),
               (279, len(raw)))  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries)
    padding = len(raw) % 2
    head = b"II*\0" + struct.pack("<I", 8 + len(raw) + padding)
    with Image.open(io.BytesIO(head + raw + bytes(padding) + directory + bytes(4)), formats=("TIFF",)) as image:
        return image.tobytes()


def _cut(rows: NDArray[np.uint8], bits: int, num: int, order: str) -> NDArray[np.uint16]:
    """Rows of bytes → rows of `num` values."""
    if bits == 16:
        return np.ascontiguousarray(rows[:, : 2 * num]).view(f"{order}u2").astype(np.uint16)
    if bits == 8:
        return rows[:, :num].astype(np.uint16)
    cells = np.unpackbits(rows, axis=1)[:, : num * bits].reshape(len(rows), num, bits)
    values = np.zeros(cells.shape[:2], np.uint16)
    for bit in range(bits):
        values = values << np.uint16(1) | cells[..., bit]
    return values
