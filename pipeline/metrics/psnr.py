"""PSNR of 8-bit pictures, one value a picture, in three protocols.

`rgb`        all pixels, all channels (faces, LSUN).
`benchmark`  luma of ITU-R BT.601, `ceil(scale)` pixels shaved off each border (Set5 ... B100).
`div2k`      RGB, `ceil(scale) + 6` pixels shaved off each border (DIV2K as LIIF evaluates it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.metrics.protocols import PROTOCOLS, Protocol

__all__ = ["PROTOCOLS", "Protocol", "psnr"]

_LUMA = (65.738 / 256, 129.057 / 256, 25.064 / 256)


def psnr(images: Tensor, targets: Tensor, protocol: Protocol = "rgb", scale: float = 1.0) -> Tensor:
    """uint8 (B,3,H,W) twice → decibels (B,) float64; infinite for equal pictures. The mean over pictures is the figure.

    Raises `UserError` for an unknown protocol, and when the shaved border leaves nothing.
    """
    check_pictures(images, targets)
    difference = (images.double() - targets.double()) / 255.0
    if protocol == "benchmark":
        difference = (difference * difference.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    difference = shave(difference, border(protocol, scale))
    return -10.0 * difference.square().mean(dim=(1, 2, 3)).log10()


def border(protocol: str, scale: float) -> int:
    """Pixels that a protocol ignores at each border."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r} is not known; use one of {', '.join(PROTOCOLS)}")
    return {"rgb": 0, "benchmark": math.ceil(scale), "div2k": math.ceil(scale) + 6}[protocol]


def shave(images: Tensor, num_pixels: int) -> Tensor:
    """(B,C,H,W) without its outer `num_pixels` rows and columns."""
    height, width = images.shape[-2:]
    if 2 * num_pixels >= min(height, width):
        raise UserError(
            f"a border of {num_pixels} pixels leaves nothing of an image of {height}x{width}; use larger ones"
        )
    return images[..., num_pixels : height - num_pixels, num_pixels : width - num_pixels]


def check_pictures(images: Tensor, targets: Tensor) -> None:
    """Both uint8 (B,3,H,W) of one shape: figures are defined on rounded 8-bit pictures."""
    for tensor in (images, targets):
        if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[1] != 3:
            raise UserError(f"metrics need uint8 pictures (B,3,H,W), got {tensor.dtype} {tuple(tensor.shape)}")
    if images.shape != targets.shape:
        raise UserError(f"cannot compare pictures of shape {tuple(images.shape)} with {tuple(targets.shape)}")
