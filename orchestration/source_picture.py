"""A picture to enlarge, with what must survive: transparency, colour profile and EXIF."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from pipeline.errors import UserError
from preprocess.images import decode, open_header
from preprocess.rejects import Reject

MAX_INPUT_PIXELS = 100_000_000


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
    upright = ImageOps.exif_transpose(header) or header
    icc, exif = header.info.get("icc_profile"), _exif(upright)
    if not _is_rgb_profile(icc):
        icc = None
    has_alpha = header.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in header.info
    if not has_alpha and (icc is None or header.mode not in ("RGB", "P")):
        return SourcePicture(plain, exif=exif)
    rgba = upright.convert("RGBA")
    alpha = torch.from_numpy(np.asarray(rgba.getchannel("A")).copy())[None, None] if has_alpha else None
    return SourcePicture(rgba.convert("RGB"), alpha, icc, exif)


def _exif(upright: Image.Image) -> bytes | None:
    """The EXIF block without its orientation; None where there is none or it cannot be read."""
    try:
        exif = upright.getexif()
        if not exif:
            return None
        exif.pop(0x0112, None)
        return exif.tobytes() if len(exif) else None
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, struct.error):
        return None  # EXIF is written by anything: a picture is worth more than its broken block


def _is_rgb_profile(icc: bytes | None) -> bool:
    if not icc:
        return False
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.xcolor_space.strip() == "RGB"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False
