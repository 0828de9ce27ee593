"""LPIPS (Zhang et al. 2018): distance of deep features, layer by layer, weighted by learned heads.

Legend: B batch, C channels of a layer, H/W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.metrics.backbones import convolutions, init_random
from pipeline.metrics.psnr import check_pictures

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """uint8 (B,3,H,W) twice → distance (B,). Layers are unit-normalised along channels; heads are per-channel weights.

    net "alexnet" is the variant that papers report. Weights come from `load_lpips`, or `random_lpips` for the stand-in.
    """

    min_size = 32

    def __init__(self, net: Literal["vgg16", "alexnet"] = "alexnet") -> None:
        super().__init__()
        features, self.taps = convolutions(net)
        self.features = nn.Sequential(*list(features)[: max(self.taps) + 1])
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(channels)) for channels in self.taps.values()])

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        check_pictures(images, targets)
        if min(images.shape[-2:]) < self.min_size:
            raise UserError(f"LPIPS needs pictures of at least {self.min_size} pixels, got {tuple(images.shape[-2:])}")
        x, y = self._prepare(images), self._prepare(targets)
        total = torch.zeros(len(images), device=images.device)
        taps = iter(self.heads)
        for index, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if index in self.taps:
                difference = (_unit(x) - _unit(y)).square()  # (B,C,H,W)
                total = total + (difference * next(taps).view(1, -1, 1, 1)).sum(1).mean(dim=(1, 2))
        return total

    def _prepare(self, images: Tensor) -> Tensor:
        shift = torch.tensor(_SHIFT, device=images.device).view(1, 3, 1, 1)
        scale = torch.tensor(_SCALE, device=images.device).view(1, 3, 1, 1)
        return (images.float() / 127.5 - 1.0 - shift) / scale


def random_lpips(seed: int = 2020) -> Lpips:
    """`lpips_random_vgg`: untrained VGG16 with a fixed seed, every channel with weight one."""
    model = Lpips("vgg16")
    init_random(model, seed)
    for head in model.heads:
        head.data.fill_(1.0)
    return model


def _unit(x: Tensor) -> Tensor:
    """Each pixel's channel vector at length one."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
