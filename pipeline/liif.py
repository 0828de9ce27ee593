"""f_theta, the paper's head: LIIF (Chen, Liu & Wang, CVPR 2021), rewritten exactly for speed.

Legend: B batch, K = h·w latent cells, Q output pixels of one chunk, D hidden width.
Input of the MLP for one pixel and one of its 4 nearest cells: feature (ch), relative coordinate (y, x), pixel size in
cells (y, x). Three things make it fast without changing the function:
  1. the first layer is linear in the feature: W_f · feature + bias is computed once a cell (the *table*) and gathered;
  2. on a grid, relative coordinates and blend weights are products of one vector a row and one a column;
  3. the blend of the 4 predictions is linear, as is the last layer, so hidden activations are blended before it.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.geometry import Axis

CPU_CHUNK = 1024
"""Output pixels a chunk: on a CPU the activations (4 corners × 1024 × 256 floats = 4 MB) stay in cache."""
CUDA_CHUNK = 1 << 17
GRADIENT_CHUNK = 1 << 14
"""With gradient on a CPU: fewer, larger chunks, since each is evaluated again for its gradient."""


class LiifHead(nn.Module):
    """MLP of `depth` hidden ReLU layers of `width` units and 3 outputs."""

    def __init__(self, feature_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.feature_channels, self.width, self.depth = feature_channels, width, depth
        widths = [feature_channels + 4, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:]))
        self.out = nn.Linear(width, 3)

    def table(self, features: Tensor) -> Tensor:
        """Features (B,ch,h,w) → (B,h,w,D): the first layer's feature part and bias, once a cell."""
        first = cast(nn.Linear, self.hidden[0])
        return torch.nn.functional.linear(
            features.permute(0, 2, 3, 1), first.weight[:, : self.feature_channels], first.bias
        )

    def grid(self, table: Tensor, rows: Axis, cols: Axis, *, chunk: int | None = None) -> Tensor:
        """All pixels rows × cols: table (B,h,w,D) → (B,3,len(rows),len(cols))."""
        with_grad = torch.is_grad_enabled() and (table.requires_grad or self.out.weight.requires_grad)
        chunk = chunk or (CUDA_CHUNK if table.is_cuda else GRADIENT_CHUNK if with_grad else CPU_CHUNK)
        num_cols = min(len(cols), chunk)
        num_rows = max(1, chunk // num_cols)
        batch = table.shape[0]
        blocks = [
            (y, min(y + num_rows, len(rows)), x, min(x + num_cols, len(cols)))
            for y in range(0, len(rows), num_rows)
            for x in range(0, len(cols), num_cols)
        ]
        image = None if with_grad else table.new_empty(batch, 3, len(rows), len(cols))
        strips: dict[int, list[Tensor]] = {}
        for y0, y1, x0, x1 in blocks:
            block_rows, block_cols = rows.narrow(y0, y1), cols.narrow(x0, x1)
            outputs = []
            for b in range(batch):
                evaluate = partial(self._block, rows=block_rows, cols=block_cols)
                if with_grad and len(blocks) > 1:
                    outputs.append(checkpoint(evaluate, table[b], use_reentrant=False))
                else:
                    outputs.append(evaluate(table[b]))
            block = torch.stack(outputs)
            if image is not None:
                image[:, :, y0:y1, x0:x1] = block
            else:
                strips.setdefault(y0, []).append(block)
        if image is not None:
            return image
        return torch.cat([torch.cat(strip, dim=3) for strip in strips.values()], dim=2)

    def points(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """Single pixels: table (B,h,w,D), axes with fields (B,Q) → (B,3,Q)."""
        batch, _, w, _ = table.shape
        outputs = []
        for b in range(batch):
            row = rows.select(b)
            col = cols.select(b)
            cell = torch.stack([y * w + x for y in (row.lower, row.upper) for x in (col.lower, col.upper)])
            rel_y = torch.stack([row.rel_lower, row.rel_lower, row.rel_upper, row.rel_upper])
            rel_x = torch.stack([col.rel_lower, col.rel_upper, col.rel_lower, col.rel_upper])
            weight = torch.stack(
                [wy * wx for wy in (row.weight_lower, row.weight_upper) for wx in (col.weight_lower, col.weight_upper)]
            )
            outputs.append(self._mlp(table[b], cell, rel_y, rel_x, weight, rows.cell, cols.cell))
        return torch.stack(outputs)

    def _block(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """table (h,w,D) → (3, len(rows), len(cols))."""
        w = table.shape[1]
        shape = (4, len(rows), len(cols))
        lower_upper_y, lower_upper_x = (rows.lower, rows.upper), (cols.lower, cols.upper)
        cell = torch.stack([y[:, None] * w + x[None, :] for y in lower_upper_y for x in lower_upper_x])
        rel_y = torch.stack([rows.rel_lower, rows.rel_lower, rows.rel_upper, rows.rel_upper])
        rel_x = torch.stack([cols.rel_lower, cols.rel_upper, cols.rel_lower, cols.rel_upper])
        weight = torch.stack(
            [
                wy[:, None] * wx[None, :]
                for wy in (rows.weight_lower, rows.weight_upper)
                for wx in (cols.weight_lower, cols.weight_upper)
            ]
        )
        out = self._mlp(
            table,
            cell.reshape(4, -1),
            rel_y[:, :, None].expand(shape).reshape(4, -1),
            rel_x[:, None, :].expand(shape).reshape(4, -1),
            weight.reshape(4, -1),
            rows.cell,
            cols.cell,
        )
        return out.reshape(3, len(rows), len(cols))

    def _mlp(
        self, table: Tensor, cell: Tensor, rel_y: Tensor, rel_x: Tensor, weight: Tensor, cell_y: float, cell_x: float
    ) -> Tensor:
        """table (h,w,D), the rest (4,Q) → (3,Q)."""
        first = cast(nn.Linear, self.hidden[0])
        weights = first.weight[:, self.feature_channels :]  # (D,4): rel y, rel x, cell y, cell x
        shift = weights[:, 2] * cell_y + weights[:, 3] * cell_x
        rel = torch.stack([rel_y.reshape(-1), rel_x.reshape(-1), torch.ones_like(rel_x).reshape(-1)], dim=1)
        position = torch.stack([weights[:, 0], weights[:, 1], shift])
        gathered = table.reshape(-1, self.width).index_select(0, cell.reshape(-1))
        if torch.is_grad_enabled():
            hidden = torch.relu(torch.addmm(gathered, rel, position))
            for layer in list(self.hidden)[1:]:
                hidden = torch.relu(layer(hidden))
        else:
            hidden = gathered.addmm_(rel, position).relu_()
            for layer in list(self.hidden)[1:]:
                hidden = layer(hidden).relu_()
        blended = (hidden.reshape(4, -1, self.width) * weight[:, :, None]).sum(0)
        return self.out(blended).t()
