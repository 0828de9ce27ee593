"""A picture as it was read: upright, 8 bits, with what must survive. Legend: H/W pixels."""

from __future__ import annotations

import contextlib
import functools
import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageCms

if TYPE_CHECKING:
    from torch import Tensor

HAS_MORE = "latentzoom:has_more"
"""In a Pillow image's `info`: the file holds further frames or pages."""


@dataclass(frozen=True)
class Picture:
    """image: "RGB", or "L" where the file has grey only. Its numbers are the file's own, in the colours of `icc` where
    there is a profile. alpha: "L". exif: an EXIF block that says upright. has_more: the file holds further frames or
    pages, which are not read."""

    image: Image.Image
    alpha: Image.Image | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    has_more: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image.height, self.image.width

    @property
    def is_grey(self) -> bool:
        return self.image.mode == "L"

    @functools.cached_property
    def is_colourless(self) -> bool:
        """Whether it shows greys only, be it of one channel or of three that are equal."""
        if self.is_grey:
            return True
        array = np.asarray(self.image)
        return bool((array[..., :1] == array[..., 1:]).all())

    def rgb(self) -> Tensor:
        """(1,3,H,W) in [-1, 1]."""
        import torch

        array = np.array(self.image.convert("RGB"))
        return torch.from_numpy(array).permute(2, 0, 1)[None].float().div_(127.5).sub_(1.0)

    def opacity(self) -> Tensor | None:
        """Alpha, (1,1,H,W) uint8."""
        import torch

        return None if self.alpha is None else torch.from_numpy(np.array(self.alpha))[None, None]

    def srgb(self) -> Picture:
        """The same with its colours converted to sRGB; a grey profile's picture becomes RGB."""
        return self if self.icc is None else replace(self, image=to_srgb(self.image, self.icc), icc=None)

    def shown(self) -> Image.Image:
        """What a viewer shows: RGB in sRGB, over white."""
        colour = self.srgb().image.convert("RGB")
        if self.alpha is None:
            return colour
        return over_white(colour, self.alpha)


def over_white(colour: Image.Image, alpha: Image.Image) -> Image.Image:
    """ "L" or "RGB", as it shows over white through its alpha ("L")."""
    white = Image.new(colour.mode, colour.size, "white")
    white.paste(colour, mask=alpha)
    return white


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours of `image` in sRGB. A profile that is broken or of another colour space is ignored, as viewers do."""
    if image.mode == "LAB":
        lab, target = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, target, outputMode="RGB")
        assert converted is not None  # None where it is changed in place
        return converted
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
    return image if image.mode == "L" else image.convert("RGB")


def profile_space(icc: bytes | None) -> Literal["RGB", "L", ""]:
    """The mode of the pictures that a profile is for; "" for print and other profiles, for broken ones and for none."""
    if not icc:
        return ""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return ""
    return "RGB" if space == "RGB" else "L" if space == "GRAY" else ""
