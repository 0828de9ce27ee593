"""Between pictures (Pillow, 8 bits) and tensors ([-1, 1])."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture → (1,3,H,W) float32 in [-1, 1]. Other modes are converted to RGB first, alpha over white."""
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    array = np.asarray(image.convert("RGB"), dtype=np.uint8)
    return from_uint8(torch.from_numpy(array.copy()).permute(2, 0, 1)[None])


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 (…,3,H,W) → float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(image: Tensor) -> Tensor:
    """Float in [-1, 1] → uint8, rounded to nearest and clamped (never truncated)."""
    return ((image.float() + 1.0).mul_(127.5)).round_().clamp_(0, 255).to(torch.uint8)


def to_pictures(image: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1, 1] → B RGB pictures."""
    arrays = to_uint8(image).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
