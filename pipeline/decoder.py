"""The implicit neural decoder ND = f_theta ∘ D_phi, paper eq. (6): one latent → an image of any height × width.

Legend: B batch, C latent channels, ch feature channels, h/w latent cells, H/W output pixels.
D_phi runs once per latent; only the head f_theta (liif.py, light.py) depends on the output size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import DecoderConfig
from pipeline.errors import UserError
from pipeline.geometry import Axis, Size, Window, axis_at, axis_range, check_index, check_size, check_window
from pipeline.images import finite
from pipeline.light import LightHead
from pipeline.liif import LiifHead
from pipeline.plain_trunk import PlainFeatureDecoder
from pipeline.precision import is_autocast, without_autocast


def build_trunk(config: DecoderConfig, latent_channels: int) -> FeatureDecoder | PlainFeatureDecoder:
    """D_phi with group norm or without."""
    kind = FeatureDecoder if config.norm == "group" else PlainFeatureDecoder
    return kind(config, latent_channels)


class FeatureDecoder(nn.Module):
    """D_phi: the autoencoder's decoder with every up-sampling layer and the output norm and convolution removed.

    `halo` is None: through normalisation (and attention) every feature depends on the whole latent.
    """

    halo: int | None = None

    def __init__(self, config: DecoderConfig, latent_channels: int) -> None:
        super().__init__()
        from diffusers.models.unets.unet_2d_blocks import AttnUpDecoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D

        widths, groups = config.widths, config.norm_groups
        top = widths[-1]
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.conv_in = nn.Conv2d(latent_channels, top, 3, padding=1)
        self.mid_block = UNetMidBlock2D(
            in_channels=top,
            temb_channels=None,  # type: ignore[arg-type]
            resnet_eps=1e-6,
            resnet_act_fn="silu",
            attention_head_dim=top,
            resnet_groups=groups,
            add_attention=config.mid_attention,
        )
        self.up_blocks = nn.ModuleList()
        previous = top
        for level in reversed(range(len(widths))):
            options: dict[str, Any] = {
                "in_channels": previous,
                "out_channels": widths[level],
                "num_layers": config.num_res_blocks + 1,
                "resnet_eps": 1e-6,
                "resnet_groups": groups,
                "add_upsample": False,
            }
            if level in config.attention_levels:
                self.up_blocks.append(AttnUpDecoderBlock2D(**options, attention_head_dim=widths[level]))
            else:
                self.up_blocks.append(UpDecoderBlock2D(**options))
            previous = widths[level]

    def forward(self, latent: Tensor) -> Tensor:
        """Unscaled latent (B,C,h,w) → features (B,ch,h,w)."""
        hidden = self.conv_in(self.post_quant_conv(latent))
        hidden = self.mid_block(hidden)
        for block in self.up_blocks:
            hidden = block(hidden)
        return hidden


class ImplicitDecoder(nn.Module):
    """D_phi and a head. `chunk` below is the number of output pixels evaluated at once; it bounds the extra memory."""

    def __init__(self, config: DecoderConfig, latent_channels: int) -> None:
        super().__init__()
        self.config, self.latent_channels = config, latent_channels
        self.trunk = build_trunk(config, latent_channels)
        self.head: LiifHead | LightHead
        if config.kind == "liif":
            self.head = LiifHead(config.widths[0], config.mlp_width, config.mlp_depth)
        else:
            self.head = LightHead(config.widths[0], config.light_width, config.light_depth)

    def features(self, latent: Tensor) -> Tensor:
        """D_phi: unscaled latent (B,C,h,w) → features (B,ch,h,w). Raises `UserError` on wrong channels and, when
        evaluating without gradient, on NaN."""
        if latent.ndim != 4 or latent.shape[1] != self.latent_channels or 0 in latent.shape:
            raise UserError(f"latent has shape {tuple(latent.shape)}; expected (B, {self.latent_channels}, h, w)")
        # Not where it is trained, nor trained through: the check waits for the device, and every worker must go on.
        if not self.training and not torch.is_grad_enabled():
            finite(latent, "latent")
        return self.trunk(latent)

    def prepare(self, features: Tensor) -> Tensor:
        """The head's per-cell table (see the head). Compute it once and pass it to `render_table` for many windows."""
        return self.head.table(features)

    def render(self, features: Tensor, size: Size, window: Window | None = None, *, chunk: int | None = None) -> Tensor:
        """Features (B,ch,h,w) → image (B,3,H,W), about [-1,1]; or only the `window` (y0,x0,y1,x1) of it, which equals
        the same crop of the whole. Works with and without gradient; with gradient, more than one chunk is
        checkpointed. Raises `UserError` for sizes outside 1..MAX_SIDE and windows outside the size."""
        return self.render_table(self.prepare(features), size, window, chunk=chunk)

    def render_table(
        self,
        table: Tensor,
        size: Size,
        window: Window | None = None,
        *,
        chunk: int | None = None,
        cells: Size | None = None,
        origin: Size = (0, 0),
    ) -> Tensor:
        """As `render`, from `prepare`'s table (B,h,w,·). Where the table is of a part of the latent only, `cells` is
        the whole latent's size and `origin` the table's first cell in it; the window must lie on the part."""
        size = check_size(size)
        y0, x0, y1, x1 = check_window(window, size)
        if chunk is not None and chunk < 1:
            raise UserError(f"chunk = {chunk} is not allowed; use at least 1 pixel")
        cells = cells or (table.shape[1], table.shape[2])
        dtype = torch.promote_types(table.dtype, torch.float32)
        rows = axis_range(y0, y1, size[0], cells[0], dtype=dtype, device=table.device).shifted(origin[0])
        cols = axis_range(x0, x1, size[1], cells[1], dtype=dtype, device=table.device).shifted(origin[1])
        return self.head.grid(table, rows, cols, chunk=chunk)

    def render_lattice(self, features: Tensor, size: Size, rows: Tensor, cols: Tensor) -> Tensor:
        """Features (B,ch,h,w) → the pixels of an image of `size` at rows × cols, two ascending int64 vectors:
        (B,3,len(rows),len(cols)), with gradient. Raises `UserError` for indices outside the size or not ascending."""
        size = check_size(size)
        for name, index, num_pixels in (("rows", rows, size[0]), ("cols", cols, size[1])):
            check_index(index, num_pixels, name)
            if index.ndim != 1 or not len(index) or bool((index.diff() < 0).any()):
                raise UserError(f"{name} of a lattice must be a vector of ascending pixel indices, at least one")
        table = self.prepare(features)
        dtype, device = torch.promote_types(table.dtype, torch.float32), table.device
        # Not waited for: what is drawn on the host lies there.
        along_y = axis_at(rows.to(device, non_blocking=True), size[0], table.shape[1], dtype)
        along_x = axis_at(cols.to(device, non_blocking=True), size[1], table.shape[2], dtype)
        return self.head.grid(table, along_y, along_x)

    def query(self, features: Tensor, size: Size, index_y: Tensor, index_x: Tensor) -> Tensor:
        """Single pixels of an output of `size`, for training: index_y, index_x (B,Q) int64 pixel indices in 0..H-1 and
        0..W-1 → (B,3,Q), with gradient. Raises `UserError` for indices outside the size or of another kind."""
        size = check_size(size)
        check_index(index_y, size[0], "index_y")
        check_index(index_x, size[1], "index_x")
        table = self.prepare(features)
        dtype = torch.promote_types(table.dtype, torch.float32)
        rows: Axis = axis_at(index_y, size[0], table.shape[1], dtype)
        cols: Axis = axis_at(index_x, size[1], table.shape[2], dtype)
        return self.head.points(table, rows, cols)

    def forward(
        self,
        latent: Tensor,
        size: Size,
        window: Window | None = None,
        lattice: tuple[Tensor, Tensor] | None = None,
        *,
        chunk: int | None = None,
    ) -> Tensor:
        """Unscaled latent (B,C,h,w) → image (B,3,H,W), about [-1,1]; eq. (6). Or the window of it, or the pixels at the
        rows and columns of a lattice. Under autocast the light head, whose work is small, stays in float32."""
        features = self.features(latent)
        device = features.device.type
        exact = self.config.kind == "light" and is_autocast(device)
        with without_autocast(device) if exact else contextlib.nullcontext():
            features = features.float() if exact else features
            if lattice is not None:
                return self.render_lattice(features, size, *lattice)
            return self.render(features, size, window, chunk=chunk)
