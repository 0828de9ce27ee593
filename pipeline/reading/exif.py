"""EXIF: how a picture is turned, and the block that its enlargement keeps. Turning never depends on rewriting."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator

from PIL import ExifTags, Image

_ORIENTATION = 0x0112
_TIFF_TAGS = (270, 271, 272, 306, 315, 33432)
"""Description, make, model, date, artist, copyright."""
_ERRORS = (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, struct.error)
"""EXIF is written by anything: a picture is worth more than its broken block."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts. 1 where nothing is said, or nothing that can be read."""
    value = None
    try:
        value = image.getexif().get(_ORIENTATION)
    except _ERRORS:
        block = image.info.get("exif")
        if isinstance(block, bytes):
            with contextlib.suppress(*_ERRORS):
                body = bytearray(block.removeprefix(b"Exif\0\0"))
                order, entries = _first_directory(body)
                for entry in entries:
                    if struct.unpack_from(f"{order}HH", body, entry) == (_ORIENTATION, 3):
                        value = struct.unpack_from(f"{order}H", body, entry + 8)[0]
    if isinstance(value, (bytes, tuple)) and value:  # one byte, or several numbers, where one of 16 bits belongs
        value = value[0]
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def turned_upright(image: Image.Image, turned: int) -> Image.Image:
    return image.transpose(_UPRIGHT[turned]) if turned in _UPRIGHT else image


def upright_block(image: Image.Image, reopened: Callable[[], Image.Image]) -> bytes | None:
    """The EXIF block of a loaded picture, saying upright; None where there is none or it cannot be read. reopened: the
    same file, opened and not loaded (Pillow reads a TIFF's inner directories only from a file that is still open)."""
    try:
        block = image.info.get("exif")
        if isinstance(block, bytes):
            return _saying_upright(block)
        exif = _of_tiff(reopened()) if image.format == "TIFF" else image.getexif()
        if not exif:
            return None
        turned = exif.pop(_ORIENTATION, None)
        try:
            return exif.tobytes() if len(exif) else None
        finally:
            if turned is not None:
                exif[_ORIENTATION] = turned  # the image is the caller's
    except _ERRORS:
        return None


def _of_tiff(header: Image.Image) -> Image.Exif:
    """What a TIFF says as EXIF would, without how its own pixels are laid out."""
    tags, exif = header.getexif(), Image.Exif()
    for code in _TIFF_TAGS:
        if code in tags:
            exif[code] = tags[code]
    for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if inner := tags.get_ifd(directory):
            exif.get_ifd(directory).update(inner)
    return exif


def _saying_upright(block: bytes) -> bytes:
    """An EXIF block with orientation 1 and without its thumbnail, otherwise byte for byte: written anew, texts beyond
    ASCII and makers' notes would be lost. Raises `ValueError` or `struct.error` for another thing."""
    body = bytearray(block.removeprefix(b"Exif\0\0"))
    order, entries = _first_directory(body)
    end = 0
    for entry in entries:
        if struct.unpack_from(f"{order}H", body, entry) == (_ORIENTATION,):
            struct.pack_into(f"{order}HIHH", body, entry + 2, 3, 1, 1, 0)  # one 16-bit number: 1
        end = entry + 12
    struct.pack_into(f"{order}I", body, end, 0)  # where the thumbnail's directory began
    return bytes(body)


def _first_directory(body: bytearray) -> tuple[str, Iterator[int]]:
    """Byte order and the places of the first directory's entries in an EXIF block, which is a small TIFF."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(body[:4]))
    if order is None:
        raise ValueError("no EXIF block")
    (first,) = struct.unpack_from(f"{order}I", body, 4)
    (num_entries,) = struct.unpack_from(f"{order}H", body, first)
    if not num_entries:
        raise ValueError("an EXIF block without entries")
    return order, iter(range(first + 2, first + 2 + 12 * num_entries, 12))
