"""Bytes of any image file → an upright 8-bit `Picture`, or a named reason why not.

The header decides before anything is decoded: format and size. Then layout (TIFF), damage (JPEG), 16-bit range, EXIF
orientation, transparency and colours are settled, in that order. Animations: the first frame.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.reading import holes, jpeg, tiff
from pipeline.reading.deep_colour import is_deep_grey, load_rounded
from pipeline.reading.exif import orientation, turned_upright, upright_block
from pipeline.reading.header import DECODE_ERRORS, FORMATS, Unreadable, detail, open_header
from pipeline.reading.picture import HAS_MORE, Picture, profile_space, to_srgb


def decode(data: bytes, max_pixels: int) -> Picture:
    """Raises `Unreadable`."""
    if tiff.is_tiff(data) and (decoded := tiff.decode(data, max_pixels)) is not None:
        return replace(picture_of(decoded, None), has_more=bool(decoded.info.get(HAS_MORE)))
    image, pixels = open_header(data, max_pixels)
    try:
        has_more = _has_more(image)
        image.seek(0)
        feed = jpeg.watch(image, pixels)
        is_grey = is_deep_grey(image)
        load_rounded(image, pixels, FORMATS)
        trouble = feed.trouble() if feed is not None else holes.trouble(image, pixels)
        image = image.convert("LA") if is_grey else image
    except (*DECODE_ERRORS, Image.DecompressionBombError, MemoryError) as error:
        raise Unreadable("damaged", detail(error)) from error
    if trouble:
        raise Unreadable("damaged", trouble)
    picture = picture_of(image, upright_block(image, lambda: open_header(data, max_pixels)[0]))
    return replace(picture, has_more=has_more)


def oriented_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) as shown, from the header alone. Raises `Unreadable`."""
    try:
        image, _ = open_header(data, max_pixels)
    except Unreadable as error:
        if error.reason != "too_large" and tiff.is_tiff(data) and (size := tiff.oriented_size(data, max_pixels)):
            return size
        raise
    width, height = image.size
    is_turned = image.format != "TIFF" and orientation(image) in (5, 6, 7, 8)  # of a TIFF Pillow gives it upright
    return (width, height) if is_turned else (height, width)


def _has_more(image: Image.Image) -> bool:
    """Whether there are further frames or pages. What phones append to a JPEG (gain maps, depth) is none."""
    if image.format not in ("GIF", "WEBP", "AVIF", "TIFF"):
        return bool(image.info.get(HAS_MORE))
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:  # further frames that are damaged
        return True


def picture_of(image: Image.Image, exif: bytes | None) -> Picture:
    """A loaded Pillow image of any mode, with what its `info` says, as a picture. Raises `Unreadable`."""
    icc = image.info.get("icc_profile")
    try:
        colour, alpha = _in_8_bits(turned_upright(image, orientation(image)))
        if colour.mode not in ("L", "RGB"):  # print and other spaces
            colour, icc = to_srgb(colour, icc), None
    except DECODE_ERRORS as error:
        raise Unreadable("unsupported", f"mode {image.mode}: {detail(error)}") from error
    return Picture(colour, alpha, icc if profile_space(icc) == colour.mode else None, exif)


def _in_8_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours ("L", "RGB", or a space that needs conversion) and alpha."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        return _of_16_bits(image)
    if mode == "F":
        raise Unreadable("unsupported", "floating-point pixels have no agreed range")
    if mode == "1":
        mode, image = "L", _as_grey(image)
    if mode == "La":
        mode, image = "LA", image.convert("LA")
    if mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    is_clear = "transparency" in image.info
    if mode in ("RGBA", "RGBa", "PA") or (mode in ("P", "RGB", "L") and is_clear):
        rgba = image.convert("RGBA")
        colour = rgba.getchannel("R") if mode == "L" or _is_grey_palette(image) else rgba.convert("RGB")
        return colour, rgba.getchannel("A")
    if mode == "P":
        return image.convert("L" if _is_grey_palette(image) else "RGB"), None
    return (image.convert("RGB"), None) if mode in ("RGBX", "YCbCr", "HSV") else (image, None)


def _as_grey(image: Image.Image) -> Image.Image:
    grey = image.convert("L")
    if "transparency" in image.info:
        grey.info["transparency"] = image.info["transparency"]
    return grey


def _is_grey_palette(image: Image.Image) -> bool:
    """Whether every colour that a palette picture uses is grey."""
    if image.mode not in ("P", "PA") or image.palette is None:
        return False
    palette = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    used = np.flatnonzero(np.asarray(image.getchannel(0).histogram() if image.mode == "PA" else image.histogram()))
    used = used[used < len(palette)]
    return bool((palette[used] == palette[used][:, :1]).all())


def _of_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values: NDArray[np.int64] = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Unreadable("unsupported", "32-bit pixels have no agreed range")
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey, None
    return grey, Image.fromarray(((values != clear) * 255).astype(np.uint8))
