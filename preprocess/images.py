"""Bytes of any image file → an 8-bit sRGB picture, or a named reason why not.

The header decides before anything is decoded: format (from the content, never the file name) and size. Then EXIF
orientation, colour profile, 16-bit range, transparency (over white) and animation (first frame) are settled, in that
order, so that what is trained on is what a viewer shows. 16 bits become 8 by rounding (see `deep_colour`).
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline.errors import first_line
from preprocess.crops import Box
from preprocess.deep_colour import load_rounded
from preprocess.rejects import Reject

# Formats that need no outside program and that no script can hide in (EPS would start Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def use_own_size_limit() -> None:
    """Switch Pillow's size guess off in this process: `open_header` applies the limit that the user chose."""
    Image.MAX_IMAGE_PIXELS = None


def open_header(data: bytes, max_pixels: int) -> Image.Image:
    """An undecoded image whose format and size are allowed. Raises `Reject`:
    empty, not_an_image (unknown content), damaged (known content, unreadable), too_large."""
    if not data:
        raise Reject("empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Reject("too_large", _detail(error)) from error
    except _DECODE_ERRORS as error:
        reason = "damaged" if data.startswith(_MAGIC) else "not_an_image"
        raise Reject(reason, _detail(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise Reject("too_large", f"{height}x{width} has more than {max_pixels} pixels")
    if min(width, height) < 1:
        raise Reject("damaged", f"{height}x{width} pixels")
    return image


def oriented_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) as shown, from the header alone."""
    image = open_header(data, max_pixels)
    width, height = image.size
    orientation = 1
    with contextlib.suppress(*_DECODE_ERRORS):
        orientation = image.getexif().get(0x0112, 1)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """An RGB image as a viewer shows it. Raises `Reject`."""
    image = open_header(data, max_pixels)
    try:
        image.seek(0)
        load_rounded(image, data, FORMATS)
    except (*_DECODE_ERRORS, Image.DecompressionBombError, MemoryError) as error:
        raise Reject("damaged", _detail(error)) from error
    profile = image.info.get("icc_profile")
    try:
        with contextlib.suppress(*_DECODE_ERRORS):  # unreadable EXIF: the picture is still good
            image = ImageOps.exif_transpose(image) or image
        return _to_rgb(image, profile)
    except _DECODE_ERRORS as error:
        raise Reject("unsupported", f"mode {image.mode}: {_detail(error)}") from error


def _detail(error: BaseException) -> str:
    """An error in words that are the same in every process: details enter receipts, ledger and manifest."""
    if isinstance(error, UnidentifiedImageError):
        return "content is of no known image format"
    return _ADDRESS.sub("", first_line(error))


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bit(image)
    if image.mode == "F":
        raise Reject("unsupported", "floating-point pixels have no agreed range")
    if image.mode == "P" or (image.mode in ("RGB", "L", "1") and "transparency" in image.info):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        colour = _to_srgb(rgba.convert("RGB") if image.mode != "LA" else image.convert("L"), profile)
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(colour, mask=rgba.getchannel("A"))
        return white
    return _to_srgb(image, profile)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of `image` in sRGB. A profile that is broken or of another colour space is ignored, as viewers do."""
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Reject("unsupported", "32-bit pixels have no agreed range")
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(grey, "L").convert("RGB")


def crop_and_resize(image: Image.Image, box: Box, size: int, resize: str) -> Image.Image:
    """The square `box` of an RGB image at size × size, anti-aliased."""
    top, left, bottom, right = box
    if (bottom - top, right - left) == (size, size):
        return image.crop((left, top, right, bottom))
    return image.resize((size, size), _FILTERS[resize], box=(left, top, right, bottom), reducing_gap=3.0)


def encode_pixels(image: Image.Image, pixel_format: str) -> bytes:
    """The bytes of a stored sample. Plain settings: the same picture gives the same bytes."""
    buffer = io.BytesIO()
    if pixel_format == "png":
        image.save(buffer, "PNG", compress_level=3)
    elif pixel_format == "webp":
        image.save(buffer, "WEBP", lossless=True, quality=40, method=2)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode_stored(data: bytes) -> np.ndarray:
    """Stored sample bytes → uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return np.asarray(image.convert("RGB") if image.mode != "RGB" else image)
