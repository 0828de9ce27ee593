"""The Inception network of 2015 on whose pool features FID is defined (Szegedy et al. 2016; Heusel et al. 2017).

Parameter names are those of the usual state dict, `pt_inception-2015-12-05-6726825d.pth`. It differs from torchvision's
Inception v3 as TensorFlow's graph does: average pools ignore the padding, the last block pools by maximum,
pictures are resized with corners as pixel origins and scaled to [-1, 1). Legend: B batch, C channels, H/W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
NUM_FEATURES = 2048
_Kernel = int | tuple[int, int]
_Pool = Literal["average", "maximum", "stride"]


@dataclass(frozen=True)
class _Step:
    """One convolution of a branch: name in the state dict, channels out, kernel, stride; padded unless it strides."""

    name: str
    channels: int
    kernel: _Kernel = 1
    stride: int = 1


@dataclass(frozen=True)
class _Branch:
    """Convolutions in a row; `fork` convolutions all see the result of the row and are concatenated."""

    steps: tuple[_Step, ...]
    fork: tuple[_Step, ...] = ()


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, step: _Step, padded: bool = True) -> None:
        super().__init__()
        kernel = (step.kernel, step.kernel) if isinstance(step.kernel, int) else step.kernel
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and step.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, step.channels, kernel, stride=step.stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(step.channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Parallel branches and a pooling branch, concatenated along channels. pool_channels 0: no convolution after it."""

    def __init__(self, in_channels: int, branches: tuple[_Branch, ...], pool: _Pool, pool_channels: int) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        self.out_channels = pool_channels or in_channels
        for branch in branches:
            channels = in_channels
            for step in branch.steps:
                setattr(self, step.name, ConvNormRelu(channels, step))
                channels = step.channels
            for step in branch.fork:
                setattr(self, step.name, ConvNormRelu(channels, step))
            self.out_channels += sum(s.channels for s in branch.fork) if branch.fork else channels
        self.branch_pool = ConvNormRelu(in_channels, _Step("branch_pool", pool_channels)) if pool_channels else None

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for branch in self.branches:
            y = x
            for step in branch.steps:
                y = getattr(self, step.name)(y)
            results += [getattr(self, step.name)(y) for step in branch.fork] or [y]
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        elif self.pool == "maximum":
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.max_pool2d(x, 3, stride=2)
        results.append(pooled if self.branch_pool is None else self.branch_pool(pooled))
        return torch.cat(results, dim=1)


class Inception2015(nn.Module):
    """uint8 (B,3,H,W) → pool features (B,2048) float32."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormRelu(3, _Step("", 32, 3, 2))
        self.Conv2d_2a_3x3 = ConvNormRelu(32, _Step("", 32, 3), padded=False)
        self.Conv2d_2b_3x3 = ConvNormRelu(32, _Step("", 64, 3))
        self.Conv2d_3b_1x1 = ConvNormRelu(64, _Step("", 80, 1))
        self.Conv2d_4a_3x3 = ConvNormRelu(80, _Step("", 192, 3), padded=False)
        channels = 192
        for name, (branches, pool, pool_channels) in _BLOCKS.items():
            block = InceptionBlock(channels, branches, pool, pool_channels)
            setattr(self, name, block)
            channels = block.out_channels
        self.fc = nn.Linear(NUM_FEATURES, 1008)  # in the state dict, not needed for features

    def forward(self, images: Tensor) -> Tensor:
        x = (resize_like_tensorflow1(images.float(), INPUT_SIZE) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # (B,64,73,73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # (B,192,35,35)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean(dim=(2, 3))


class ScriptedInception(nn.Module):
    """The TorchScript file `inception-2015-12-05.pt` behind the same interface; it resizes and scales by itself."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.script(images, return_features=True)
        return features.float()


def resize_like_tensorflow1(images: Tensor, size: int) -> Tensor:
    """(B,C,H,W) → (B,C,size,size) as TensorFlow 1's bilinear resize without aligned corners: output pixel i samples at
    i · H / size, without anti-aliasing."""
    left, right, weight = _taps(int(images.shape[-1]), size, images.device)
    rows = images[..., left] + (images[..., right] - images[..., left]) * weight
    top, bottom, weight = _taps(int(images.shape[-2]), size, images.device)
    return rows[..., top, :] + (rows[..., bottom, :] - rows[..., top, :]) * weight[:, None]


def _taps(num_in: int, num_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    position = torch.arange(num_out, dtype=torch.float32, device=device) * (num_in / num_out)
    first = position.floor().long().clamp(max=num_in - 1)
    return first, (first + 1).clamp(max=num_in - 1), position - first


def _chain(prefix: str, *steps: tuple[int, _Kernel]) -> _Branch:
    return _Branch(
        tuple(_Step(f"{prefix}_{i}", channels, kernel) for i, (channels, kernel) in enumerate(steps, start=1))
    )


def _mixed5(pool_channels: int) -> tuple[tuple[_Branch, ...], _Pool, int]:
    branches = (
        _Branch((_Step("branch1x1", 64),)),
        _chain("branch5x5", (48, 1), (64, 5)),
        _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
    )
    return branches, "average", pool_channels


def _mixed6(width: int) -> tuple[tuple[_Branch, ...], _Pool, int]:
    wide, tall = (1, 7), (7, 1)
    branches = (
        _Branch((_Step("branch1x1", 192),)),
        _chain("branch7x7", (width, 1), (width, wide), (192, tall)),
        _chain("branch7x7dbl", (width, 1), (width, tall), (width, wide), (width, tall), (192, wide)),
    )
    return branches, "average", 192


def _mixed7(pool: _Pool) -> tuple[tuple[_Branch, ...], _Pool, int]:
    branches = (
        _Branch((_Step("branch1x1", 320),)),
        _Branch((_Step("branch3x3_1", 384),), (_Step("branch3x3_2a", 384, (1, 3)), _Step("branch3x3_2b", 384, (3, 1)))),
        _Branch(
            (_Step("branch3x3dbl_1", 448), _Step("branch3x3dbl_2", 384, 3)),
            (_Step("branch3x3dbl_3a", 384, (1, 3)), _Step("branch3x3dbl_3b", 384, (3, 1))),
        ),
    )
    return branches, pool, 192


_BLOCKS: dict[str, tuple[tuple[_Branch, ...], _Pool, int]] = {
    "Mixed_5b": _mixed5(32),
    "Mixed_5c": _mixed5(64),
    "Mixed_5d": _mixed5(64),
    "Mixed_6a": (
        (
            _Branch((_Step("branch3x3", 384, 3, 2),)),
            _Branch(
                (_Step("branch3x3dbl_1", 64), _Step("branch3x3dbl_2", 96, 3), _Step("branch3x3dbl_3", 96, 3, 2)),
            ),
        ),
        "stride",
        0,
    ),
    "Mixed_6b": _mixed6(128),
    "Mixed_6c": _mixed6(160),
    "Mixed_6d": _mixed6(160),
    "Mixed_6e": _mixed6(192),
    "Mixed_7a": (
        (
            _Branch((_Step("branch3x3_1", 192), _Step("branch3x3_2", 320, 3, 2))),
            _Branch(
                (
                    _Step("branch7x7x3_1", 192),
                    _Step("branch7x7x3_2", 192, (1, 7)),
                    _Step("branch7x7x3_3", 192, (7, 1)),
                    _Step("branch7x7x3_4", 192, 3, 2),
                )
            ),
        ),
        "stride",
        0,
    ),
    "Mixed_7b": _mixed7("average"),
    "Mixed_7c": _mixed7("maximum"),
}
