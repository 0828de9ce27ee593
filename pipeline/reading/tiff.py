"""TIFF layouts that Pillow reads wrongly or not at all: decoded by tifffile, or refused by their name.

Pillow takes for granted that 16-bit values lie pixel by pixel, that 0 is black, that integers have no sign and fill
their range. Legend: H/W pixels, C channels.
"""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.reading.exif import turned_upright
from pipeline.reading.header import DECODE_ERRORS, Unreadable, check_pixels, open_header
from pipeline.reading.picture import HAS_MORE

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 256, 257, 258, 262, 284, 339
_COLOURS = {0: "miniswhite", 1: "minisblack", 2: "rgb", 3: "palette", 4: "mask", 5: "cmyk", 6: "ycbcr", 8: "cielab"}
_UNSIGNED, _SEPARATE = 1, 2


def is_tiff(data: bytes) -> bool:
    return data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def decode(data: bytes, max_pixels: int) -> Image.Image | None:
    """The first picture of a TIFF whose layout is not for Pillow, upright; None where Pillow reads it right, or where
    it is no TIFF at all. Raises `Unreadable`."""
    import tifffile

    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # or it prints what is odd about a file, beside what we say
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages.first
            tags = {tag.code: tag.value for tag in page.tags.values()}
            if not {_WIDTH, _HEIGHT} <= set(tags):
                return None
            if _is_for_pillow(tags) and _pillow_opens(data, max_pixels):
                return None
            check_pixels(page.imagelength, page.imagewidth, max_pixels)
            layout = _layout(page, tags)
            image = turned_upright(_decoded(page, tags, layout), tags.get(274, 1))
            image.info[HAS_MORE] = len(file.pages) > 1
            return image
    except (*DECODE_ERRORS, tifffile.TiffFileError):
        return None  # Pillow says what is wrong


def _is_for_pillow(tags: dict[int, Any]) -> bool:
    bits, signs = _values(tags, _BITS, 1), _values(tags, _SAMPLE_FORMAT, _UNSIGNED)
    colours = tags.get(_PHOTOMETRIC, 1)
    if bits == {32} and 3 not in signs:
        return True  # as Pillow itself writes 16-bit values; `decode` refuses larger ones
    if signs != {_UNSIGNED} or len(bits) > 1:
        return False
    return max(bits) <= 8 or (bits == {16} and tags.get(_PLANAR, 1) != _SEPARATE and colours in (1, 2, 5))


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
    return f"{bits}-bit{kind} {colours}, {getattr(page.compression, 'name', page.compression).lower()}{planes}"


def _decoded(page: Any, tags: dict[int, Any], layout: str) -> Image.Image:
    if _values(tags, _SAMPLE_FORMAT, _UNSIGNED) == {3}:
        raise Unreadable("unsupported", f"floating-point pixels have no agreed range (TIFF, {layout})")
    if _values(tags, _SAMPLE_FORMAT, _UNSIGNED) != {_UNSIGNED}:
        raise Unreadable("unsupported", f"signed pixels have no agreed range (TIFF, {layout})")
    bits = max(_values(tags, _BITS, 1))
    if bits > 16:
        raise Unreadable("unsupported", f"{bits}-bit pixels have no agreed range (TIFF, {layout})")
    colours, num = tags.get(_PHOTOMETRIC, 1), {0: 1, 1: 1, 2: 3, 5: 4}.get(tags.get(_PHOTOMETRIC, 1), 0)
    ends = [start + length for start, length in zip(page.dataoffsets, page.databytecounts)]
    if max(ends, default=0) > page.parent.filehandle.size:
        raise Unreadable("damaged", f"the file ends before its pixels do (TIFF, {layout})")
    try:
        values = np.asarray(page.asarray())
    except (*DECODE_ERRORS, ImportError) as error:
        reason = "unsupported" if "imagecodecs" in str(error) else "damaged"
        raise Unreadable(reason, f"no reader for this layout (TIFF, {layout})") from error
    if not num or values.dtype not in (np.uint8, np.uint16) or page.imagedepth != 1:
        raise Unreadable("unsupported", f"no reader for this layout (TIFF, {layout})")
    if values.ndim == 2:
        values = values[..., None]
    elif tags.get(_PLANAR, 1) == _SEPARATE:
        values = np.moveaxis(values, 0, -1)
    if values.shape[:2] != (page.imagelength, page.imagewidth) or values.shape[2] < num:
        raise Unreadable("unsupported", f"no reader for this layout (TIFF, {layout})")
    image = _image(values, num, 2**bits - 1, colours == 0, tuple(int(e) for e in page.extrasamples))
    if isinstance(icc := tags.get(34675), bytes):
        image.info["icc_profile"] = icc
    return image


def _image(values: NDArray[Any], num: int, largest: int, is_negative: bool, extra: tuple[int, ...]) -> Image.Image:
    """values (H,W,C): num colours, then what `extra` says (1: alpha multiplied in, 2: alpha)."""
    colour = values[..., :num].astype(np.int64)
    alpha = values[..., num].astype(np.int64) if extra[:1] in ((1,), (2,)) and values.shape[2] > num else None
    if alpha is not None and extra[0] == 1:
        colour = np.minimum(colour * largest // np.maximum(alpha, 1)[..., None], largest)
    if is_negative:
        colour = largest - colour
    eight = ((colour * 255 + largest // 2) // largest).astype(np.uint8)
    image = Image.fromarray(eight[..., 0] if num == 1 else eight, "CMYK" if num == 4 else None)
    if alpha is not None and num < 4:
        image.putalpha(Image.fromarray(((alpha * 255 + largest // 2) // largest).astype(np.uint8)))
    return image
