"""VGG16 and AlexNet convolution stacks; torchvision's parameter names, so that its weight files load, without it.

Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

VGG16_PLAN: tuple[int | str, ...] = (
    64,
    64,
    "M",
    128,
    128,
    "M",
    256,
    256,
    256,
    "M",
    512,
    512,
    512,
    "M",
    512,
    512,
    512,
    "M",
)
# Index of the ReLU after which LPIPS looks, and the channels there.
VGG16_TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
ALEXNET_TAPS = {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Vgg16(nn.Module):
    """VGG16 (Simonyan & Zisserman 2015). `forward`: uint8 (B,3,H,W) → fc2 activations (B,4096) after ReLU.

    The classifier, 119 M parameters, is only built with `with_classifier`.
    """

    def __init__(self, *, with_classifier: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(*_vgg_layers())
        self.classifier = (
            nn.Sequential(
                nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()
            )
            if with_classifier
            else None
        )

    def forward(self, images: Tensor) -> Tensor:
        if self.classifier is None:
            raise UserError("this VGG16 was built without its classifier")
        x = self.features(imagenet_normalise(images))
        return self.classifier[:5](nn.functional.adaptive_avg_pool2d(x, (7, 7)).flatten(1))


class AlexNet(nn.Module):
    """The convolution stack of AlexNet in the one-tower form that LPIPS uses."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )


class RandomVgg(nn.Module):
    """Untrained VGG16 convolutions with a fixed seed (a published stand-in: Naeem et al. 2020), averaged over the
    picture and projected at random to `dim` numbers: uint8 (B,3,H,W) → (B,dim). Pictures become `input_size`² first.

    Figures made with it carry names that say so; they only compare with each other.
    """

    def __init__(self, *, dim: int = 64, input_size: int = 64, seed: int = 2020) -> None:
        super().__init__()
        self.dim, self.input_size = dim, input_size
        self.vgg = Vgg16(with_classifier=False)
        self.project = nn.Linear(512, dim, bias=False)
        init_random(self, seed)

    def forward(self, images: Tensor) -> Tensor:
        from pipeline.metrics.ssim import resize_pictures

        images = resize_pictures(images, (self.input_size, self.input_size))
        return self.project(self.vgg.features(imagenet_normalise(images)).mean(dim=(2, 3)))


def init_random(module: nn.Module, seed: int) -> None:
    """He initialisation of every weight from one seeded generator; biases zero. In place, frozen, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            with torch.no_grad():
                layer.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
    module.eval().requires_grad_(False)


def imagenet_normalise(images: Tensor) -> Tensor:
    """uint8 (B,3,H,W) → float32 with the ImageNet mean and deviation."""
    mean = torch.tensor(_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(_STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255.0 - mean) / std


def convolutions(net: Literal["vgg16", "alexnet"]) -> tuple[nn.Sequential, dict[int, int]]:
    """An uninitialised convolution stack and its LPIPS taps {layer index: channels}."""
    if net == "vgg16":
        return Vgg16(with_classifier=False).features, VGG16_TAPS
    if net == "alexnet":
        return AlexNet().features, ALEXNET_TAPS
    raise UserError(f"network {net!r} is not known; use 'vgg16' or 'alexnet'")


def _vgg_layers() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG16_PLAN:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2, stride=2))
        else:
            layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU()]
            channels = item
    return layers
