"""Damage that shows in formats other than JPEG, and that their decoders take without a word.

Pillow stops reading a PNG at its last row, so that it meets no checksum when damaged data make rows too early; rows
that are missing stay black. Zeros where a file lost a block decode, in lossless WebP, AVIF and JPEG 2000, to something;
no encoder of these writes many zero bytes in a row. That of lossy WebP does, for flat pictures; but behind a hole too
many bytes are left over, or too few. JPEG strips and tiles of a TIFF are judged as files of their own.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from pipeline.reading import jpeg
from pipeline.reading.png import SIGNATURE, chunks

_HOLE = bytes(64)
_NOISE = bytes(i * 101 % 251 + 1 for i in range(64))
_PIECE = 1 << 20
_SPARE = 16
"""Bytes at the end of lossy WebP without which no whole picture can be decoded."""
_STRIPS, _TILES, _JPEG_TABLES = (273, 279), (324, 325), 347
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, step of rows and of columns: PNG, section 8.2."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def trouble(image: Image.Image, data: bytes) -> str:
    """What shows in a loaded picture, "" for nothing."""
    if image.format == "PNG" and (_is_checksum_wrong(data) or _ends_black(image)) and _is_spoilt(data):
        return "the picture's data do not fit its size"
    if image.format == "WEBP":
        return _hole_in_webp(data)
    if image.format == "TIFF" and image.info.get("compression") == "jpeg":
        return _hole_in_strips(image, data)
    if image.format in ("AVIF", "JPEG2000"):
        return _hole_among_notes(image, data)
    return ""


def _ends_black(image: Image.Image) -> bool:
    """Whether there is a row of zeros among the last two (interlaced, either may come last)."""
    bottom = range(max(0, image.height - 2), image.height)
    return any(not any(image.crop((0, row, image.width, row + 1)).tobytes()) for row in bottom)


def _is_spoilt(data: bytes) -> bool:
    """Whether the packed data are not those of all rows: too few, or damaged so that they would go on."""
    width, height, depth, kind, _, _, interlace = struct.unpack_from(">IIBBBBB", data, len(SIGNATURE) + 8)
    passes = _PASSES if interlace else ((0, 0, 1, 1),)
    needed = 0
    for top, left, down, across in passes:
        rows, columns = max(0, -(-(height - top) // down)), max(0, -(-(width - left) // across))
        needed += rows * (1 + -(-columns * depth * _CHANNELS[kind] // 8)) if columns else 0
    unpack, found = zlib.decompressobj(), 0
    for rest in _packed(data):
        while rest and found <= needed:
            try:
                found += len(unpack.decompress(rest, _PIECE))
            except zlib.error:
                return True
            rest = unpack.unconsumed_tail
    return found < needed or (found > needed and not unpack.eof)


def _is_checksum_wrong(data: bytes) -> bool:
    return any(
        zlib.crc32(memoryview(data)[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big")
        for start, end, name in chunks(data)
        if name == b"IDAT"
    )


def _packed(data: bytes) -> Iterator[bytes]:
    """Of the pixels, chunk by chunk; the last may be cut."""
    place = len(SIGNATURE)
    for start, place, name in chunks(data):
        if name == b"IDAT":
            yield data[start + 8 : place - 4]
    if data[place + 4 : place + 8] == b"IDAT":
        yield data[place + 8 :]


def _hole_in_webp(data: bytes) -> str:
    place = 12
    while place + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, place)
        start, end = place + 8, place + 8 + length
        is_packed = name == b"VP8L" or (name == b"ALPH" and data[start] & 3 == 1)
        hole = data.find(_HOLE, start, end) if is_packed or name == b"VP8 " else -1
        if hole >= 0 and (is_packed or _are_bytes_left_over(data, place, end)):
            return f"a hole at byte {hole}"
        place = end + length % 2
    return ""


def _are_bytes_left_over(data: bytes, place: int, end: int) -> bool:
    """Whether lossy WebP, in the chunk at [place, end), can be decoded without its last bytes."""
    length = max(0, end - place - 8 - _SPARE)
    chunk = b"VP8 " + struct.pack("<I", length) + data[place + 8 : place + 8 + length] + bytes(length % 2)
    shorter = b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk
    try:
        with Image.open(io.BytesIO(shorter), formats=("WEBP",)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


def _hole_in_strips(image: Any, data: bytes) -> str:
    """JPEG strips or tiles of a TIFF that hold many zeros."""
    tags = image.tag_v2
    is_tiled = _TILES[0] in tags
    starts, lengths = (tags.get(tag, ()) for tag in (_TILES if is_tiled else _STRIPS))
    tables = bytes(tags.get(_JPEG_TABLES, b""))[:-2]  # without their end marker
    for start, length in zip(starts, lengths):
        if (hole := data.find(_HOLE, start, start + length)) < 0:
            continue
        strip = data[start : start + length]
        strip = tables + strip[2:] if tables else strip
        with Image.open(io.BytesIO(strip), formats=("JPEG",)) as part:
            feed = jpeg.watch(part, strip)
            part.load()
        if feed is not None and feed.trouble():
            return f"a hole at byte {hole}"
    return ""


def _hole_among_notes(image: Image.Image, data: bytes) -> str:
    """The file holds notes too, where zeros are nothing strange: other bytes in their place change no pixel."""
    hole = data.find(_HOLE)
    if hole < 0:
        return ""
    other = data[:hole] + _NOISE + data[hole + len(_HOLE) :]
    try:
        with Image.open(io.BytesIO(other), formats=(str(image.format),)) as changed:
            is_hole = changed.tobytes() != image.tobytes()
    except (OSError, ValueError, SyntaxError):
        is_hole = True
    return f"a hole at byte {hole}" if is_hole else ""
