"""The heads on a CPU, float32, without gradient: pixels in blocks whose activations stay in cache.

Two things beyond the plain path. Gathering and combining rows of a table is one pass over memory (`embedding_bag` with
weights): for `liif` feature part + rel_y · w_y + rel_x · w_x, for `light` the blend of cells' linear fields.
And a layer's bias and ReLU are part of its matrix product (oneDNN). Legend as in liif.py; a block has Q pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.geometry import Axis
from pipeline.kernels.threads import for_each

_MAX_ROWS = 2**31 - 1
"""Row numbers are 32-bit: `embedding_bag` is about twice as fast so."""


@dataclass(frozen=True)
class Block:
    """Pixels of a block: images b0..b1-1, their rows y0..y1-1 and columns x0..x1-1."""

    b0: int
    b1: int
    y0: int
    y1: int
    x0: int
    x1: int

    def into(self, image: Tensor, pixels: Tensor) -> None:
        """Write pixels (Q,3) into image (B,3,H,W)."""
        shape = self.b1 - self.b0, self.y1 - self.y0, self.x1 - self.x0, 3
        image[self.b0 : self.b1, :, self.y0 : self.y1, self.x0 : self.x1] = pixels.reshape(shape).permute(0, 3, 1, 2)


def supports(table: Tensor, with_grad: bool) -> bool:
    """Whether this file covers a table (B,h,w,·): a CPU, float32, no gradient."""
    return (
        not with_grad
        and table.device.type == "cpu"
        and table.dtype == torch.float32
        and 3 * table.shape[:3].numel() + 2 <= _MAX_ROWS
    )


def blocks_of(batch: int, height: int, width: int, chunk: int) -> list[Block]:
    """The grid in blocks of at most `chunk` pixels: several small images, or rows of one, or parts of a row."""
    if height * width <= chunk:
        group = chunk // (height * width)
        return [Block(b, min(b + group, batch), 0, height, 0, width) for b in range(0, batch, group)]
    num_cols = min(width, chunk)
    num_rows = max(1, chunk // num_cols)
    return [
        Block(b, b + 1, y, min(y + num_rows, height), x, min(x + num_cols, width))
        for b in range(batch)
        for y in range(0, height, num_rows)
        for x in range(0, width, num_cols)
    ]


def render_liif(
    table: Tensor, rows: Axis, cols: Axis, layers: list[nn.Linear], out: nn.Linear, position: Tensor, chunk: int
) -> Tensor:
    """table (B,h,w,D), hidden layers after the first, position (D,4): the first layer's columns for relative y and x
    and pixel size y and x → image (B,3,len(rows),len(cols))."""
    table, rows, cols = crop_to_window(table, rows, cols)
    batch, h, w, width = table.shape
    shift = position[:, 2] * rows.cell + position[:, 3] * cols.cell
    num_cells = batch * h * w
    augmented = torch.cat([(table + shift).reshape(num_cells, width), position[:, :2].t()])
    image = table.new_empty(batch, 3, len(rows), len(cols))

    def evaluate(block: Block) -> None:
        cell, rel_y, rel_x, weight = _corners(block, rows, cols, h, w)
        row_y, row_x = torch.full_like(cell, num_cells), torch.full_like(cell, num_cells + 1)
        index = torch.stack([cell, row_y, row_x], dim=-1)
        factor = torch.stack([torch.ones_like(rel_y), rel_y, rel_x], dim=-1)
        hidden = weighted_rows(augmented, index.reshape(-1, 3), factor.reshape(-1, 3)).relu_()
        for layer in layers:
            hidden = linear_relu(hidden, layer)
        each = torch.arange(hidden.shape[0], dtype=torch.int32).reshape(-1, 4)
        block.into(image, out(weighted_rows(hidden, each, weight.reshape(-1, 4))))

    for_each(evaluate, blocks_of(batch, len(rows), len(cols), chunk))
    return image


def render_light(
    table: Tensor, rows: Axis, cols: Axis, layers: list[nn.Linear], out: nn.Linear, shift: Tensor, chunk: int
) -> Tensor:
    """table (B,h,w,3D): constant, slope in y, slope in x of each cell; shift (D,) of the pixel size → image.

    The blend of 4 cells' fields is separable: along y at the cells' columns, once for all pixels between two columns,
    then along x. Nothing of the table's size is made: its rows are read where they are.
    """
    table, rows, cols = crop_to_window(table, rows, cols)
    batch, h, w = table.shape[:3]
    fields = table.reshape(batch * h * w * 3, -1)
    width = fields.shape[1]
    image = table.new_empty(batch, 3, len(rows), len(cols))
    (cell_y, factor_y), (cell_x, factor_x) = _two_cells(rows), _two_cells(cols)

    def evaluate(block: Block) -> None:
        num_images, num_rows = block.b1 - block.b0, block.y1 - block.y0
        first, last = int(cols.lower[block.x0]), int(cols.upper[block.x1 - 1]) + 1
        # Along y: constant + slope_y · rel_y and slope_x of the lower and the upper cell, weighted, for each column.
        cells = torch.arange(block.b0, block.b1, dtype=torch.int32)[:, None, None, None] * (h * w)
        cells = cells + cell_y[block.y0 : block.y1, None, :] * w
        cells = (cells + torch.arange(first, last, dtype=torch.int32)[:, None]) * 3
        factor = factor_y[block.y0 : block.y1, None].expand(*cells.shape, 2)
        lines = torch.stack(
            [
                weighted_rows(fields, _reshaped(cells[..., None] + _CONSTANT_AND_SLOPE, 4), _reshaped(factor, 4)),
                weighted_rows(fields, _reshaped(cells + 2, 2), _reshaped(factor[..., 0], 2)),
            ],
            dim=1,
        )
        lines[:, 0] += shift  # the weights along x sum to 1
        # Along x: value + slope · rel_x of the two columns around each pixel, weighted.
        starts = torch.arange(num_images * num_rows, dtype=torch.int32) * (last - first)
        places = (starts[:, None, None] + (cell_x[block.x0 : block.x1] - first)) * 2
        factor = factor_x[block.x0 : block.x1].expand(*places.shape, 2)
        index = _reshaped(places[..., None] + _CONSTANT_AND_SLOPE, 4)
        hidden = weighted_rows(lines.reshape(-1, width), index, _reshaped(factor, 4)).relu_()
        for layer in layers:
            hidden = linear_relu(hidden, layer)
        block.into(image, out(hidden))

    for_each(evaluate, blocks_of(batch, len(rows), len(cols), chunk))
    return image


_CONSTANT_AND_SLOPE = torch.tensor([0, 1], dtype=torch.int32)


def _two_cells(axis: Axis) -> tuple[Tensor, Tensor]:
    """Of Q positions: lower and upper cell, int32 (Q,2); of each its weight and weight · rel. coordinate, (Q,2,2)."""
    weight = torch.stack([axis.weight_lower, axis.weight_upper], dim=1)
    rel = torch.stack([axis.rel_lower, axis.rel_upper], dim=1)
    return torch.stack([axis.lower, axis.upper], dim=1).to(torch.int32), torch.stack([weight, weight * rel], dim=2)


def _reshaped(values: Tensor, size: int) -> Tensor:
    return values.reshape(-1, size)


def crop_to_window(table: Tensor, rows: Axis, cols: Axis) -> tuple[Tensor, Axis, Axis]:
    """Only the cells that the pixels touch, and the axes counted from there. Pixels ascend along both axes."""
    y0, y1, x0, x1 = int(rows.lower[0]), int(rows.upper[-1]) + 1, int(cols.lower[0]), int(cols.upper[-1]) + 1
    return table[:, y0:y1, x0:x1], rows.shifted(y0), cols.shifted(x0)


def _corners(block: Block, rows: Axis, cols: Axis, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cell number (int32), relative y, relative x, blend weight: each (images, rows, columns, 2, 2)."""
    rows, cols = rows.narrow(block.y0, block.y1), cols.narrow(block.x0, block.x1)
    shape = block.b1 - block.b0, len(rows), len(cols), 2, 2
    first = torch.arange(block.b0, block.b1, dtype=torch.int32) * (h * w)
    cell_y = torch.stack([rows.lower, rows.upper], dim=1).to(torch.int32) * w
    cell_x = torch.stack([cols.lower, cols.upper], dim=1).to(torch.int32)
    cell = first[:, None, None, None, None] + (cell_y[:, None, :, None] + cell_x[None, :, None, :])
    rel_y = torch.stack([rows.rel_lower, rows.rel_upper], dim=1)[:, None, :, None].expand(shape)
    rel_x = torch.stack([cols.rel_lower, cols.rel_upper], dim=1)[None, :, None, :].expand(shape)
    weight_y = torch.stack([rows.weight_lower, rows.weight_upper], dim=1)[:, None, :, None]
    weight_x = torch.stack([cols.weight_lower, cols.weight_upper], dim=1)[None, :, None, :]
    return cell, rel_y, rel_x, (weight_y * weight_x).expand(shape)


def weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """table (N,D), index (Q,k) int32, weight (Q,k) → (Q,D): sum over k of weight · table[index], in one pass."""
    num, size = index.shape
    offsets = torch.arange(0, num * size + 1, size, dtype=torch.int32)
    return torch.embedding_bag(
        table, index.reshape(-1), offsets, False, 0, False, weight.reshape(-1), include_last_offset=True
    )[0]


def _plain_linear_relu(hidden: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(hidden, layer.weight, layer.bias).relu_()


def _fused_linear_relu(hidden: Tensor, layer: nn.Linear) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, layer.weight, layer.bias, "relu", [], "")


def _choose_linear_relu() -> Callable[[Tensor, nn.Linear], Tensor]:
    """The fused operation is not part of PyTorch's public interface: use it only where it is there."""
    has_fused = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return _fused_linear_relu if has_fused else _plain_linear_relu


linear_relu = _choose_linear_relu()
"""relu(layer(hidden)) for hidden (Q,D)."""
