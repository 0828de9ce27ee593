"""LPIPS as a training loss, from weights that the user has (Zhang et al., CVPR 2018)."""

from __future__ import annotations

import torch
from torch import nn


def load_lpips(url: str, device: torch.device) -> nn.Module:
    """LPIPS with VGG16 features: images (B,3,H,W) in [-1,1] twice → distance (B,). Frozen."""
    raise NotImplementedError
