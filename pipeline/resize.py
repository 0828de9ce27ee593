"""Resizing of image tensors; down-sampling is anti-aliased.  Images are (B,3,H,W)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def resize(image: Tensor, size: Size, mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic") -> Tensor:
    """(B,3,H,W) → (B,3,*size), pixel-centre convention, value range kept except for bicubic's overshoot."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if mode == "nearest":
        return F.interpolate(image, size=tuple(size), mode="nearest-exact")
    return F.interpolate(image, size=tuple(size), mode=mode, align_corners=False, antialias=True)


def resize_nearest_released(image: Tensor, size: Size) -> Tensor:
    """Nearest neighbour as the released code does it (`floor(i · H_in / H_out)`), for its SR condition."""
    return F.interpolate(image, size=tuple(size), mode="nearest")


def enlarge(image: Tensor, size: Size, mode: str) -> Tensor:
    """A low-resolution image (B,3,h,w) in [-1, 1] as SR conditions are made: "nearest" as in the released code, or
    "bicubic" without its overshoot → (B,3,*size)."""
    if mode == "nearest":
        return resize_nearest_released(image, size)
    return resize(image, size).clamp(-1.0, 1.0)
