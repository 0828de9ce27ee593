"""What the stages share besides the session: the result of a stage and a figure of merit."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Mean over images of the peak signal-to-noise ratio in dB; values in [-1,1], (B,3,H,W) twice → scalar."""
    error = (image.float().clamp(-1, 1) - truth.float()).square().flatten(1).mean(dim=1)
    return (10.0 * torch.log10(4.0 / error.clamp_min(1e-12))).mean()
