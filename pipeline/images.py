"""Between pictures (Pillow, 8 bits) and tensors ([-1, 1])."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import UserError
from pipeline.reading import PictureSource, read_picture


def to_tensor(image: PictureSource) -> Tensor:
    """What a viewer shows of a picture → (1,3,H,W) float32 in [-1, 1]: upright, sRGB, alpha over white."""
    picture = read_picture(image)
    return type(picture)(picture.shown()).rgb()


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 (…,3,H,W) → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(image: Tensor) -> Tensor:
    """Float in [-1, 1] → uint8, rounded to nearest and clamped (never truncated). `UserError` for NaN and infinity."""
    return rounded(finite(image, "the picture"))


def rounded(image: Tensor) -> Tensor:
    """As `to_uint8`, of what is known to be finite: the question would wait for the device."""
    return ((image.float() + 1.0).mul_(127.5)).round_().clamp_(0, 255).to(torch.uint8)


def to_pictures(image: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1, 1] → B RGB pictures."""
    arrays = to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself; `UserError` when it holds NaN or infinite values."""
    # A sum is a quarter of the work, and finite only where all values are; one that overflows proves nothing.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise UserError(
            f"{name} holds NaN or infinite values; where a network overflows in half precision, "
            "use --dtype float32 or bfloat16"
        )
    return tensor
