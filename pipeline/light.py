"""The light head: a narrow MLP whose first layer is a local linear field held at latent resolution.

In the spirit of latent-modulated functions (He & Jin, CVPR 2024): the work that depends on the content is done once a
latent cell, the work per output pixel is a few thousand multiply-accumulates. Legend as in liif.py; D is 64 here.

Each cell k carries a linear field A_k + Y_k·rel_y + X_k·rel_x in the hidden space (its table, 3·D numbers). A pixel's
first hidden vector blends the fields of its 4 nearest cells with the local-ensemble weights (continuous across cells),
adds the effect of the pixel size, and goes through a narrow MLP to RGB.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.chunks import render_in_chunks
from pipeline.geometry import Axis
from pipeline.kernels import cpu

CPU_CHUNK = 32768
"""Output pixels a chunk and thread."""
CUDA_CHUNK = 1 << 18
GRADIENT_CHUNK = 1 << 17
"""With gradient on a CPU: every chunk's gather costs a pass over the whole table on the way back, so few of them."""


class LightHead(nn.Module):
    """`width` hidden units, `depth` hidden ReLU layers per pixel (the first is the blended field)."""

    def __init__(self, feature_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.feature_channels, self.width, self.depth = feature_channels, width, depth
        self.field = nn.Sequential(
            nn.Conv2d(feature_channels, 2 * feature_channels, 1),
            nn.SiLU(),
            nn.Conv2d(2 * feature_channels, 3 * width, 1),
        )
        self.pixel_size = nn.Linear(2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, 3)

    def table(self, features: Tensor) -> Tensor:
        """Features (B,ch,h,w) → (B,h,w,3D): the fields A, Y, X of each cell."""
        # As matrix products over channels-last cells: what comes out is already in the order of the table.
        first, second = cast(nn.Conv2d, self.field[0]), cast(nn.Conv2d, self.field[2])
        cells = features.permute(0, 2, 3, 1)
        hidden = F.silu(F.linear(cells, first.weight.flatten(1), first.bias))
        return F.linear(hidden, second.weight.flatten(1), second.bias)

    def macs_per_pixel(self, scale: float) -> float:
        """Multiply-accumulates an output pixel at `scale` pixels a cell and axis, the table's share included."""
        blend = 4 * 3 * self.width
        table = 2 * self.feature_channels * (self.feature_channels + 3 * self.width)
        return blend + (self.depth - 1) * self.width**2 + 3 * self.width + table / scale**2

    def grid(self, table: Tensor, rows: Axis, cols: Axis, *, chunk: int | None = None) -> Tensor:
        """All pixels rows × cols: table (B,h,w,3D) → (B,3,len(rows),len(cols))."""
        with_grad = torch.is_grad_enabled() and (table.requires_grad or self.out.weight.requires_grad)
        if cpu.supports(table, with_grad):
            shift = self._shift(table, rows.cell, cols.cell)
            layers = [cast(nn.Linear, layer) for layer in self.hidden]
            part = max(1, chunk // torch.get_num_threads()) if chunk else CPU_CHUNK
            return cpu.render_light(table, rows, cols, layers, self.out, shift, part)
        rows, cols = rows.to(table.dtype), cols.to(table.dtype)
        chunk = chunk or (CUDA_CHUNK if table.is_cuda else GRADIENT_CHUNK if with_grad else CPU_CHUNK)
        return render_in_chunks(self._block, table, rows, cols, chunk=chunk, with_grad=with_grad)

    def points(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """Single pixels: table (B,h,w,3D), axes with fields (B,Q) → (B,3,Q)."""
        batch = torch.arange(table.shape[0], device=table.device)[:, None]
        hidden = table.new_zeros(*rows.lower.shape, self.width)
        for index_y, rel_y, weight_y in rows.sides():
            for index_x, rel_x, weight_x in cols.sides():
                constant, slope_y, slope_x = table[batch, index_y, index_x].chunk(3, dim=-1)
                field = constant + slope_y * rel_y[..., None] + slope_x * rel_x[..., None]
                hidden = hidden + field * (weight_y * weight_x)[..., None]
        return self._mlp(hidden, rows.cell, cols.cell).transpose(1, 2)

    def _block(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """table (B,h,w,3D) → (B,3,len(rows),len(cols)). The blend is separable: along y at latent columns, then x."""
        lower = self._blend_y(table.index_select(1, rows.lower), rows.rel_lower, rows.weight_lower)
        upper = self._blend_y(table.index_select(1, rows.upper), rows.rel_upper, rows.weight_upper)
        value, slope = lower[0] + upper[0], lower[1] + upper[1]  # (B,R,w,D) each
        hidden = None
        for index_x, rel_x, weight_x in cols.sides():
            part = torch.addcmul(value.index_select(2, index_x), slope.index_select(2, index_x), rel_x[:, None])
            part = part * weight_x[:, None]
            hidden = part if hidden is None else hidden + part
        assert hidden is not None
        return self._mlp(hidden, rows.cell, cols.cell).permute(0, 3, 1, 2)

    def _blend_y(self, cells: Tensor, rel: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        constant, slope_y, slope_x = cells.chunk(3, dim=-1)
        weight = weight[:, None, None]
        return (constant + slope_y * rel[:, None, None]) * weight, slope_x * weight

    def _shift(self, like: Tensor, cell_y: float, cell_x: float) -> Tensor:
        """What the pixel's size adds to the first hidden vector, (D,). The two numbers are filled in where they are
        used: brought there as a tensor, they would wait for the device."""
        return self.pixel_size(torch.stack([like.new_full((), cell_y), like.new_full((), cell_x)]))

    def _mlp(self, hidden: Tensor, cell_y: float, cell_x: float) -> Tensor:
        hidden = torch.relu(hidden + self._shift(hidden, cell_y, cell_x))
        for layer in self.hidden:
            hidden = torch.relu(cast(nn.Linear, layer)(hidden))
        return self.out(hidden)
