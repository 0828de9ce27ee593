"""A picture to enlarge, with what must survive: transparency, colour profile and EXIF."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

from pipeline.errors import UserError
from preprocess.deep_colour import load_rounded
from preprocess.images import FORMATS, decode, open_header
from preprocess.rejects import Reject

MAX_INPUT_PIXELS = 100_000_000
_ORIENTATION = 0x0112
_TIFF_TAGS = (270, 271, 272, 306, 315, 33432)
"""Description, make, model, date, artist, copyright."""


@dataclass(frozen=True)
class SourcePicture:
    """image: RGB, upright. Its numbers are the file's own, in the colours of `icc` where there is a profile."""

    image: Image.Image
    alpha: Tensor | None = None
    """(1,1,H,W) uint8."""
    icc: bytes | None = None
    exif: bytes | None = None


def read_picture(data: bytes, name: str) -> SourcePicture:
    """Any image file's bytes. A profile of another kind than RGB (print, grey) is converted to sRGB and dropped. Raises
    `UserError` naming the picture when it cannot be read or has more than MAX_INPUT_PIXELS."""
    try:
        plain = decode(data, MAX_INPUT_PIXELS)  # also says clearly what is damaged or unsupported
        header = open_header(data, MAX_INPUT_PIXELS)
    except Reject as error:
        raise UserError(f"{name} cannot be read as a picture: {error}") from error
    load_rounded(header, data, FORMATS)
    upright = ImageOps.exif_transpose(header) or header
    icc, exif = header.info.get("icc_profile"), _exif(header, data)
    if not _is_rgb_profile(icc):
        icc = None
    if upright.mode.startswith("I;16") and "transparency" in header.info:
        seen = np.asarray(upright) != header.info["transparency"]
        return SourcePicture(plain, _as_alpha(seen.astype(np.uint8) * 255), exif=exif)
    has_alpha = header.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in header.info
    if not has_alpha and (icc is None or header.mode not in ("RGB", "P")):
        return SourcePicture(plain, exif=exif)
    rgba = upright.convert("RGBA")
    alpha = _as_alpha(np.array(rgba.getchannel("A"))) if has_alpha else None
    return SourcePicture(rgba.convert("RGB"), alpha, icc, exif)


def _as_alpha(opacity: NDArray[np.uint8]) -> Tensor:
    """(H,W) → (1,1,H,W)."""
    return torch.from_numpy(opacity)[None, None]


def _exif(header: Image.Image, data: bytes) -> bytes | None:
    """The EXIF block of a loaded picture, upright; None where there is none or it cannot be read."""
    try:
        block = header.info.get("exif")
        if isinstance(block, bytes):
            return _turned_upright(block)
        # Pillow reads a TIFF's inner directories only from a file that is still open.
        exif = _of_tiff(open_header(data, MAX_INPUT_PIXELS)) if header.format == "TIFF" else header.getexif()
        if not exif:
            return None
        exif.pop(_ORIENTATION, None)
        return exif.tobytes() if len(exif) else None
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, struct.error):
        return None  # EXIF is written by anything: a picture is worth more than its broken block


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


def _turned_upright(block: bytes) -> bytes:
    """An EXIF block (a small TIFF) with orientation 1 and without its thumbnail, otherwise byte for byte: written anew,
    texts beyond ASCII and makers' notes would be lost. Raises `ValueError` or `struct.error` for another thing."""
    body = bytearray(block.removeprefix(b"Exif\0\0"))
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(body[:4]))
    if order is None:
        raise ValueError("no EXIF block")
    (first,) = struct.unpack_from(f"{order}I", body, 4)
    (num_entries,) = struct.unpack_from(f"{order}H", body, first)
    end = first + 2 + 12 * num_entries
    for entry in range(first + 2, end, 12):
        if struct.unpack_from(f"{order}H", body, entry) == (_ORIENTATION,):
            struct.pack_into(f"{order}HIHH", body, entry + 2, 3, 1, 1, 0)  # one 16-bit number: 1
    struct.pack_into(f"{order}I", body, end, 0)  # where the thumbnail's directory began
    return bytes(body)


def _is_rgb_profile(icc: bytes | None) -> bool:
    if not icc:
        return False
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.xcolor_space.strip() == "RGB"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False
