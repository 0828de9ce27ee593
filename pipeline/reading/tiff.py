"""TIFF layouts that Pillow reads wrongly or not at all: decoded by `tiff_values`, or refused by their name.

Pillow takes for granted that values lie pixel by pixel, that 0 is black where they have 16 bits, that integers have no
sign and fill their range. Legend: H/W pixels, C channels.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.reading.exif import turned_upright
from pipeline.reading.header import DECODE_ERRORS, Unreadable, check_pixels, detail, open_header
from pipeline.reading.picture import HAS_MORE
from pipeline.reading.tiff_values import UnknownLayout, read_values

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 256, 257, 258, 262, 284, 339
_COMPRESSION, _SAMPLES, _PALETTE, _SUBSAMPLING, _JPEG = 259, 277, 320, 530, 7
_COLOURS = {0: "miniswhite", 1: "minisblack", 2: "rgb", 3: "palette", 4: "mask", 5: "cmyk", 6: "ycbcr", 8: "cielab"}
_UNSIGNED, _SEPARATE = 1, 2
_DEFLATE = (8, 32946)


def is_tiff(data: bytes) -> bool:
    return data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def decode(data: bytes, max_pixels: int) -> Image.Image | None:
    """The first picture of a TIFF whose layout is not for Pillow, upright; None where Pillow reads it right, or where
    it is no TIFF at all. Raises `Unreadable`."""
    opened = _opened(data)
    if opened is None:
        return None
    page, tags, layout, is_for_pillow = opened
    if is_for_pillow and _pillow_opens(data, max_pixels):
        return None
    try:
        check_pixels(page.imagelength, page.imagewidth, max_pixels)
        image = turned_upright(_decoded(page, data, tags, layout), tags.get(274, 1))
    except (*DECODE_ERRORS, MemoryError) as error:
        raise Unreadable("damaged", f"{detail(error)} (TIFF, {layout})") from error
    image.info[HAS_MORE] = _has_more(page)
    return image


def oriented_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(height, width) as shown of a TIFF whose layout Pillow does not know; None where that is not said."""
    opened = _opened(data)
    if opened is None:
        return None
    page, tags, _, _ = opened
    height, width = page.imagelength, page.imagewidth
    try:
        check_pixels(height, width, max_pixels)
    except DECODE_ERRORS:
        return None
    return (width, height) if tags.get(274, 1) in (5, 6, 7, 8) else (height, width)


def _opened(data: bytes) -> tuple[Any, dict[int, Any], str, bool] | None:
    """The first page, its tags by number, its layout in words and whether that is one for Pillow. None for what is no
    TIFF: Pillow says what is wrong with it."""
    import tifffile

    for logger in (logging.getLogger("tifffile"), logging.getLogger("PIL")):
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())  # or it prints what is odd about a file, beside what we say
    try:
        page: Any = tifffile.TiffFile(io.BytesIO(data)).pages.first
        tags = {tag.code: tag.value for tag in page.tags.values()}
        opened = page, tags, _layout(page, tags), _is_for_pillow(tags)
    except (*DECODE_ERRORS, tifffile.TiffFileError):
        return None
    return opened if {_WIDTH, _HEIGHT} <= set(tags) else None


def _has_more(page: Any) -> bool:
    try:
        return len(page.parent.pages) > 1
    except DECODE_ERRORS:  # further pages that are damaged
        return True


def _is_for_pillow(tags: dict[int, Any]) -> bool:
    bits, signs = _values(tags, _BITS, 1), _values(tags, _SAMPLE_FORMAT, _UNSIGNED)
    colours = tags.get(_PHOTOMETRIC, 1)
    if bits == {32} and 3 not in signs:
        return True  # as Pillow itself writes 16-bit values; `decode` refuses larger ones
    if signs != {_UNSIGNED} or len(bits) > 1:
        return False
    if tags.get(_COMPRESSION) in _DEFLATE and colours in (0, 1, 2, 3, 5):
        return False  # libtiff does not compare the checksum
    if tags.get(_PLANAR, 1) == _SEPARATE:
        return max(bits) <= 8 and tags.get(_COMPRESSION) == _JPEG
    if colours == 6 and tags.get(_COMPRESSION, 1) == 1 and tags.get(_SUBSAMPLING, (1, 1)) != (1, 1):
        return False
    return max(bits) <= 8 or (bits == {16} and colours in (1, 2, 5))


def _values(tags: dict[int, Any], code: int, default: int) -> set[int]:
    value = tags.get(code, default)
    return {int(v) for v in value} if isinstance(value, tuple) else {int(value)}


def _pillow_opens(data: bytes, max_pixels: int) -> bool:
    try:
        open_header(data, max_pixels)
    except Unreadable as error:
        return error.reason == "too_large"
    return True


def _layout(page: Any, tags: dict[int, Any]) -> str:
    """In words, such as "32-bit float minisblack, lzw"."""
    bits = "/".join(str(b) for b in sorted(_values(tags, _BITS, 1)))
    kinds = {1: "", 2: " signed", 3: " float"}
    kind = "/".join(kinds.get(k, " void") for k in sorted(_values(tags, _SAMPLE_FORMAT, _UNSIGNED)))
    colours = _COLOURS.get(tags.get(_PHOTOMETRIC, 1), f"photometric {tags.get(_PHOTOMETRIC)}")
    planes = ", separate planes" if tags.get(_PLANAR, 1) == _SEPARATE else ""
    num = tags.get(_SAMPLES, 1)
    samples = f" of {num} samples" if num != {2: 3, 5: 4, 6: 3, 8: 3}.get(tags.get(_PHOTOMETRIC, 1), 1) else ""
    return f"{bits}-bit{kind} {colours}{samples}, {getattr(page.compression, 'name', page.compression).lower()}{planes}"


def _decoded(page: Any, data: bytes, tags: dict[int, Any], layout: str) -> Image.Image:
    if _values(tags, _SAMPLE_FORMAT, _UNSIGNED) == {3}:
        raise Unreadable("unsupported", f"floating-point pixels have no agreed range (TIFF, {layout})")
    if _values(tags, _SAMPLE_FORMAT, _UNSIGNED) != {_UNSIGNED}:
        raise Unreadable("unsupported", f"signed pixels have no agreed range (TIFF, {layout})")
    bits = max(_values(tags, _BITS, 1))
    if bits > 16:
        raise Unreadable("unsupported", f"{bits}-bit pixels have no agreed range (TIFF, {layout})")
    colours, num = tags.get(_PHOTOMETRIC, 1), {0: 1, 1: 1, 2: 3, 5: 4}.get(tags.get(_PHOTOMETRIC, 1), 0)
    if not num and colours != 3:
        raise Unreadable("unsupported", f"no reader for this layout (TIFF, {layout})")
    try:
        values = read_values(page, data)
    except UnknownLayout as error:
        raise Unreadable("unsupported", f"no reader for this layout (TIFF, {layout})") from error
    if colours == 3 and values.shape[2] == 1 and _PALETTE in tags:
        values, num, bits, colours = _of_palette(values, tags[_PALETTE]), 3, 16, 2
    extra = tuple(int(e) for e in page.extrasamples)
    if not 1 <= num <= values.shape[2] <= num + len(extra):
        raise Unreadable("unsupported", f"no reader for this layout (TIFF, {layout})")
    image = _image(values, num, 2**bits - 1, colours == 0, extra)
    if isinstance(icc := tags.get(34675), bytes):
        image.info["icc_profile"] = icc
    return image


def _of_palette(values: NDArray[Any], palette: Any) -> NDArray[np.uint16]:
    """Indices (H,W,1) → 16-bit colours (H,W,3)."""
    colours = np.asarray(palette, np.uint16).reshape(3, -1).T
    if colours.max(initial=0) < 256:  # some programs write 8 bits
        colours = colours * np.uint16(257)
    if values.max(initial=0) >= len(colours):
        raise Unreadable("damaged", "colours beyond the palette")
    return colours[values[..., 0]]


def _image(values: NDArray[Any], num: int, largest: int, is_negative: bool, extra: tuple[int, ...]) -> Image.Image:
    """values (H,W,C): num colours, then what `extra` says (1: alpha multiplied in, 2: alpha)."""
    colour = values[..., :num].astype(np.uint32)
    alpha = values[..., num].astype(np.uint32) if extra[:1] in ((1,), (2,)) and values.shape[2] > num else None
    if alpha is not None and extra[0] == 1:
        colour = np.minimum(colour * largest // np.maximum(alpha, 1)[..., None], largest)
    if is_negative:
        colour = largest - colour
    eight = ((colour * 255 + largest // 2) // largest).astype(np.uint8)
    image = Image.fromarray(eight[..., 0] if num == 1 else eight, "CMYK" if num == 4 else None)
    if alpha is not None and num < 4:
        image.putalpha(Image.fromarray(((alpha * 255 + largest // 2) // largest).astype(np.uint8)))
    return image
