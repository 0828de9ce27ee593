"""The parts of a latentzoom model that diffusers does not have: its implicit decoder, and an encoder without a decoder.

This file is a part of an exported folder and stands alone: it needs torch and diffusers, not latentzoom. It computes
what latentzoom does, in the plain way: whole pictures, without tiles or kernels.
Legend: B batch, C latent channels, ch feature channels, h/w latent cells, H/W pixels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import AttnUpDecoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from torch import Tensor, nn

PIXELS_AT_ONCE = 1 << 16
"""Pixels that the head is evaluated at together: they bound its memory."""


class Axis:
    """The pixels `index` (Q, int64) of an axis of num_pixels over num_cells: the two nearest cells of each, the
    relative coordinate to each (a cell spans two units), the blend weight of each, and a pixel's size in cells, times
    two. Sizes are numbers, or tensors where a graph is traced."""

    def __init__(self, index: Tensor, num_pixels: Any, num_cells: Any, dtype: torch.dtype) -> None:
        n, h = torch.as_tensor(num_pixels), torch.as_tensor(num_cells)
        position = (2 * index + 1) * h  # centre of a pixel, times 2n
        lower = torch.div(position - n, 2 * n, rounding_mode="floor")
        self.cells = [torch.minimum(cell.clamp(min=0), h - 1) for cell in (lower, lower + 1)]
        rel = [(position - (2 * cell + 1) * n).double() / n for cell in self.cells]
        below, above = (one.abs() for one in rel)
        weight = torch.where(below + above > 0, above / (below + above), 0.5)
        self.rel = [one.to(dtype)[:, None] for one in rel]
        self.weight = [one.to(dtype)[:, None] for one in (weight, 1 - weight)]
        self.size = (2 * h.double() / n).to(dtype)


def at(table: Tensor, rows: Axis, cols: Axis, i: int, j: int) -> Tensor:
    """table (B,h,w,D) → what lies at the lower or upper cell, i and j, of every pixel: (B,rows,columns,D)."""
    return table.index_select(1, rows.cells[i]).index_select(2, cols.cells[j])


class LiifHead(nn.Module):
    """An MLP over feature, relative coordinate and pixel size at each pixel's four cells, blended (LIIF, Chen et al.,
    CVPR 2021). The blend and the last layer are linear, so the blend comes first; the first layer's feature part is
    evaluated once a cell."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        widths = [channels + 4, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:]))
        self.out = nn.Linear(width, 3)

    def table(self, features: Tensor) -> Tensor:
        first = cast(nn.Linear, self.hidden[0])
        return F.linear(features.permute(0, 2, 3, 1), first.weight[:, : self.channels], first.bias)

    def pixels(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """table (B,h,w,D) → (B,rows,columns,3)."""
        along_y, along_x, size_y, size_x = cast(nn.Linear, self.hidden[0]).weight[:, self.channels :].unbind(1)
        total: Any = 0.0
        for i in (0, 1):
            for j in (0, 1):
                hidden = at(table, rows, cols, i, j) + rows.size * size_y + cols.size * size_x
                hidden = torch.relu(hidden + rows.rel[i][:, None] * along_y + cols.rel[j] * along_x)
                for layer in list(self.hidden)[1:]:
                    hidden = torch.relu(layer(hidden))
                total = total + rows.weight[i][:, None] * cols.weight[j] * hidden
        return self.out(total)


class LightHead(nn.Module):
    """A linear field in the hidden space for each cell, blended between a pixel's four cells, then a narrow MLP."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.field = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.SiLU(), nn.Conv2d(2 * channels, 3 * width, 1)
        )
        self.pixel_size = nn.Linear(2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, 3)

    def table(self, features: Tensor) -> Tensor:
        return self.field(features).permute(0, 2, 3, 1)

    def pixels(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """table (B,h,w,3D) → (B,rows,columns,3)."""
        total: Any = 0.0
        for i in (0, 1):
            for j in (0, 1):
                constant, slope_y, slope_x = at(table, rows, cols, i, j).chunk(3, dim=-1)
                field = constant + slope_y * rows.rel[i][:, None] + slope_x * cols.rel[j]
                total = total + rows.weight[i][:, None] * cols.weight[j] * field
        size_y, size_x = self.pixel_size.weight.unbind(1)
        hidden = torch.relu(total + rows.size * size_y + cols.size * size_x + self.pixel_size.bias)
        for layer in self.hidden:
            hidden = torch.relu(layer(hidden))
        return self.out(hidden)


class PlainBlock(nn.Module):
    """x + conv2(silu(conv1(silu(x)))), without normalisation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.conv1(F.silu(hidden))))
        return inner + (hidden if self.conv_shortcut is None else self.conv_shortcut(hidden))


class PlainLevel(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.resnets = nn.ModuleList(PlainBlock(a, b) for a, b in zip(widths[:-1], widths[1:]))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.resnets:
            hidden = block(hidden)
        return hidden


class Trunk(nn.Module):
    """D_phi: an autoencoder's decoder that up-samples nothing. Latent (B,C,h,w) → features (B,ch,h,w)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        latent_channels = config.latent_channels
        widths = [config.base_width * m for m in config.width_mult]
        top, is_plain = widths[-1], config.norm == "none"
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, top, 3, padding=1)
        self.mid_block: nn.Module = PlainLevel(top, top, 2)
        if not is_plain:
            self.mid_block = UNetMidBlock2D(
                in_channels=top,
                temb_channels=None,  # type: ignore[arg-type]
                resnet_eps=1e-6,
                resnet_act_fn="silu",
                attention_head_dim=top,
                resnet_groups=config.norm_groups,
                add_attention=config.mid_attention,
            )
        self.up_blocks = nn.ModuleList()
        previous, num_blocks = top, config.num_res_blocks + 1
        for level, width in reversed(list(enumerate(widths))):
            options: dict[str, Any] = {
                "in_channels": previous,
                "out_channels": width,
                "num_layers": num_blocks,
                "resnet_eps": 1e-6,
                "resnet_groups": config.norm_groups,
                "add_upsample": False,
            }
            if is_plain:
                self.up_blocks.append(PlainLevel(previous, width, num_blocks))
            elif level in config.attention_levels:
                self.up_blocks.append(AttnUpDecoderBlock2D(**options, attention_head_dim=width))
            else:
                self.up_blocks.append(UpDecoderBlock2D(**options))
            previous = width

    def forward(self, latent: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(self.post_quant_conv(latent)))
        for block in self.up_blocks:
            hidden = block(hidden)
        return hidden


class ImplicitDecoder(ModelMixin, ConfigMixin):
    """Latent → image of any height × width (Kim & Kim, CVPR 2024, arXiv 2403.10255, eq. 6)."""

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 3,
        kind: str = "liif",
        norm: str = "group",
        inputs: str = "latent",
        base_width: int = 128,
        width_mult: tuple[int, ...] = (1, 2, 4),
        num_res_blocks: int = 2,
        attention_levels: tuple[int, ...] = (),
        mid_attention: bool = True,
        norm_groups: int = 32,
        mlp_width: int = 256,
        mlp_depth: int = 4,
        light_width: int = 64,
        light_depth: int = 3,
    ) -> None:
        super().__init__()
        self.trunk = Trunk(cast(Any, self.config))
        channels = base_width * width_mult[0]
        self.head: LiifHead | LightHead = (
            LiifHead(channels, mlp_width, mlp_depth)
            if kind == "liif"
            else LightHead(channels, light_width, light_depth)
        )

    def forward(self, latent: Tensor, size: tuple[int, int]) -> Tensor:
        """Unscaled latent (B,C,h,w) → image (B,3,*size), about [-1,1]."""
        table = self.head.table(self.trunk(latent))
        (height, width), (batch, h, w) = size, table.shape[:3]
        index_y, index_x = (torch.arange(side, device=table.device) for side in size)
        cols = Axis(index_x, width, w, table.dtype)
        num_rows = max(1, PIXELS_AT_ONCE // (batch * width))
        strips = []
        for start in range(0, height, num_rows):
            rows = Axis(index_y[start : start + num_rows], height, h, table.dtype)
            strips.append(self.head.pixels(table, rows, cols))
        return torch.cat(strips, dim=1).permute(0, 3, 1, 2)


class LatentEncoder(ModelMixin, ConfigMixin):
    """The encoder of an autoencoder whose convolutional decoder is not there. Image → latent: of kind "kl" the mean."""

    @register_to_config
    def __init__(
        self,
        kind: str = "vq",
        latent_channels: int = 3,
        base_width: int = 128,
        width_mult: tuple[int, ...] = (1, 2, 4),
        num_res_blocks: int = 2,
        attention_levels: tuple[int, ...] = (),
        mid_attention: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        blocks = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
        self.encoder = Encoder(
            in_channels=3,
            out_channels=latent_channels,
            down_block_types=tuple(blocks[level in attention_levels] for level in range(len(width_mult))),
            block_out_channels=tuple(base_width * m for m in width_mult),
            layers_per_block=num_res_blocks,
            norm_num_groups=norm_groups,
            double_z=kind == "kl",
            mid_block_add_attention=mid_attention,
        )
        channels = latent_channels * (2 if kind == "kl" else 1)
        self.quant_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B,3,H,W) in [-1, 1] → unscaled latent (B,C,h,w)."""
        return self.quant_conv(self.encoder(image))[:, : cast(Any, self.config).latent_channels]
