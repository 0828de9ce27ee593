"""PNG: chunks that are no pixels (text of any length, damaged notes) must not cost the picture.

Pillow refuses files whose texts or profile are long, or whose checksums are wrong anywhere. So it gets the chunks that
make the pixels; profile and EXIF are read here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from pipeline.reading.picture import HAS_MORE

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TURNING = (b"Raw profile type ", b"XML:com.adobe.xmp\0")
"""Texts by which some programs say how a picture is turned."""
_MAX_TEXT = 1 << 19
_MAX_PROFILE = 1 << 26


@dataclass(frozen=True)
class Notes:
    icc: bytes | None = None
    clear: bytes = b""
    exif: bytes | None = None
    is_animated: bool = False


def pixels_only(data: bytes) -> tuple[bytes, Notes]:
    """A PNG without chunks that change no pixel, and what those said. Bytes that are no chunks stay as they are."""
    kept, icc, exif, clear, is_animated = [SIGNATURE], None, None, b"", False
    end = len(SIGNATURE)
    for start, end, kind in chunks(data):
        if kind in _PIXELS:
            kept.append(data[start:end])
            clear = data[start + 8 : end - 4] if kind == b"tRNS" else clear
            continue
        body = data[start + 8 : end - 4]
        if kind[:1].isupper():  # critical and unknown: not ours to judge
            kept.append(data[start:end])
        elif zlib.crc32(kind + body) != struct.unpack(">I", data[end - 4 : end])[0]:
            continue
        elif kind == b"iCCP":
            icc = icc or _profile(body)
        elif kind == b"acTL":
            is_animated = int.from_bytes(body[:4], "big") > 1
        elif kind == b"eXIf":
            exif = exif or body
        elif body.startswith(_TURNING) and _is_short_text(kind, body):
            kept.append(data[start:end])
    kept.append(data[end:])
    return b"".join(kept), Notes(icc, clear, exif, is_animated)


def describe(image: Image.Image, data: bytes, notes: Notes) -> None:
    """Give an opened PNG its profile and EXIF, and its transparent grey in 8 bits where Pillow leaves it in fewer."""
    if notes.icc:
        image.info["icc_profile"] = notes.icc
    if notes.is_animated:
        image.info[HAS_MORE] = True
    if notes.exif:
        image.info["exif"] = b"Exif\0\0" + notes.exif.removeprefix(b"Exif\0\0")
    depth, colour_type = data[24], data[25]
    if colour_type == 0 and depth < 16 and len(notes.clear) == 2:
        largest = 2**depth - 1  # only the low bits of what is written count
        image.info["transparency"] = (int.from_bytes(notes.clear, "big") & largest) * 255 // largest


def chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, kind) of each whole chunk, up to IEND or to what is no chunk."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data) or not kind.isalpha():
            return
        yield start, end, kind
        start = end
        if kind == b"IEND":
            return


def _is_short_text(kind: bytes, body: bytes) -> bool:
    """Whether a text chunk stays well below the length that Pillow takes."""
    _, _, text = body.partition(b"\0")
    if kind == b"iTXt":
        is_packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    else:
        is_packed, text = kind == b"zTXt", text[1:] if kind == b"zTXt" else text
    if is_packed:
        unpack = zlib.decompressobj()
        try:
            unpack.decompress(text, _MAX_TEXT)
        except zlib.error:
            return False
        return not unpack.unconsumed_tail
    return kind in (b"tEXt", b"iTXt") and len(text) <= _MAX_TEXT


def _profile(body: bytes) -> bytes | None:
    """The profile in an iCCP chunk; None where it is broken or beyond all measure."""
    _, _, packed = body.partition(b"\0")
    unpack = zlib.decompressobj()
    try:
        profile = unpack.decompress(packed[1:], _MAX_PROFILE)
    except zlib.error:
        return None
    return None if unpack.unconsumed_tail else profile
