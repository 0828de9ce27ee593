"""SSIM (Wang et al. 2004) and SelfSSIM, the agreement of two sizes of one sample (paper, table of LSUN Bedroom)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.metrics.psnr import check_pictures
from pipeline.resize import Size, resize

_RADIUS, _SIGMA = 5, 1.5
WINDOW = 2 * _RADIUS + 1


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """uint8 (B,3,H,W) twice → (B,) float64: mean over channels and over the window positions inside the picture.

    Gaussian window 11×11, sigma 1.5, K = (0.01, 0.03), population covariance.
    """
    check_pictures(images, targets)
    if min(images.shape[-2:]) < WINDOW:
        raise UserError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW}, got {tuple(images.shape[-2:])}")
    x, y = images.double(), targets.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def self_ssim(first: Tensor, second: Tensor) -> Tensor:
    """One sample at two sizes, uint8 (B,3,H1,W1) and (B,3,H2,W2) → (B,) float64.

    The larger is resized to the smaller (anti-aliased bicubic, rounded to 8 bits), then SSIM.
    """
    small, large = sorted((first, second), key=lambda image: image.shape[-2] * image.shape[-1])
    size = (int(small.shape[-2]), int(small.shape[-1]))
    if large.shape[-2] < size[0] or large.shape[-1] < size[1]:
        raise UserError(f"SelfSSIM: {tuple(large.shape[-2:])} is not larger than {size} along both axes")
    return ssim(resize_pictures(large, size), small)


def self_ssim_pairs(pictures: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """(size, size, values) for every pair of sizes, each pair once, in the order given."""
    names = list(pictures)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            yield first, second, self_ssim(pictures[first], pictures[second])


def resize_pictures(images: Tensor, size: Size) -> Tensor:
    """uint8 (B,3,H,W) → uint8 (B,3,*size), anti-aliased bicubic, rounded."""
    return resize(images.float(), size).round().clamp(0, 255).to(torch.uint8)


def _blur(x: Tensor) -> Tensor:
    """Gaussian window at every position inside the picture: (B,C,H,W) → (B,C,H-10,W-10)."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    x = F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
