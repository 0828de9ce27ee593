"""D_phi without normalisation: residual blocks of activation and convolution only (EDSR's, Lim et al., CVPRW 2017).

Each output cell depends on a bounded neighbourhood (`halo`), so tiles of a large latent equal the whole. Parameters
have the names that they have with group norm, where the blocks are diffusers'.
Legend: B batch, C channels, h/w latent cells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import DecoderConfig
from pipeline.kernels import cpu
from pipeline.precision import is_autocast, without_autocast


class ResidualBlock(nn.Module):
    """x + conv2(silu(conv1(silu(x)))); where the width changes, x passes through a 1×1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden: Tensor, overwrite: bool = False) -> Tensor:
        """(B,C,h,w) → (B,C',h,w). overwrite: hidden may be written over; for no gradient only."""
        # Under autocast the activation too is that of the rounded stream: half the memory to read, and to keep.
        device = hidden.device.type
        entering = hidden.to(torch.get_autocast_dtype(device)) if is_autocast(device) else hidden
        inner = F.silu(self.conv1(F.silu(entering)), inplace=not torch.is_grad_enabled())
        if self.conv_shortcut is not None:
            return self.conv_shortcut(hidden) + self.conv2(inner)
        if not overwrite:
            return hidden + self.conv2(inner)
        if hidden.device.type == "cpu" and inner.dtype == hidden.dtype == self.conv2.weight.dtype:
            return cpu.add_convolution_(hidden, inner, self.conv2)
        return hidden.add_(self.conv2(inner))


class Level(nn.Module):
    """The residual blocks of one width."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(widths[:-1], widths[1:]))
        self.gradient_checkpointing = False  # training sets this and the function, as it does in diffusers' blocks
        self._gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        with_grad = torch.is_grad_enabled()
        recompute = self._gradient_checkpointing_func if self.gradient_checkpointing and with_grad else None
        for block in self.resnets:  # what enters the first one is not needed again either
            hidden = recompute(block, hidden) if recompute else block(hidden, overwrite=not with_grad)
        return hidden


class PlainFeatureDecoder(nn.Module):
    """See the top of the file. `halo`: cells around a cell that its features depend on; `block_dtype`: without
    gradient, what the blocks compute in (None: the dtype of the parameters)."""

    def __init__(self, config: DecoderConfig, latent_channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid_block = Level(widths[-1], widths[-1], 2)
        self.up_blocks = nn.ModuleList()
        previous = widths[-1]
        for width in reversed(widths):
            self.up_blocks.append(Level(previous, width, config.num_res_blocks + 1))
            previous = width
        num_blocks = sum(len(cast(Level, level).resnets) for level in (self.mid_block, *self.up_blocks))
        self.halo: int | None = 1 + 2 * num_blocks
        self.block_dtype: torch.dtype | None = None

    def forward(self, latent: Tensor) -> Tensor:
        """Unscaled latent (B,C,h,w) → features (B,ch,h,w)."""
        device = latent.device.type
        # What the blocks add to begins exact: under autocast only the blocks are rounded.
        with without_autocast(device):
            hidden = self.conv_in(self.post_quant_conv(latent.to(self.conv_in.weight.dtype)))
        rounded = self.block_dtype if not torch.is_grad_enabled() else None
        with torch.autocast(device, rounded) if rounded else contextlib.nullcontext():
            for level in (self.mid_block, *self.up_blocks):
                hidden = level(hidden)
        return hidden.to(self.conv_in.weight.dtype) if rounded else hidden
