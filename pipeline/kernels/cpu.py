"""On a CPU without gradient. The heads, float32: pixels in blocks whose activations stay in cache.

Two things beyond the plain path. Gathering and combining rows of a table is one pass over memory (`embedding_bag` with
weights): for `liif` feature part + rel_y · w_y + rel_x · w_x, for `light` the blend of cells' linear fields along y.
And what follows a matrix product or a convolution (bias, ReLU, a sum) is part of it (oneDNN). Legend as in liif.py; a
block has Q pixels.
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
    then along x, as a matrix product with the weights of a few columns. Nothing of the table's size is made.
    """
    batch, width = table.shape[0], table.shape[3] // 3
    image = table.new_empty(batch, 3, len(rows), len(cols))
    cell_y, factor_y = _two_cells(rows)
    strips = _strips(cols)
    num_rows = max(1, chunk // max(len(strip.value) for strip in strips))

    def evaluate(block: tuple[int, int, _Strip]) -> None:
        b, y0, strip = block
        y1, (num_pixels, num_cells) = min(y0 + num_rows, len(rows)), strip.value.shape
        top, bottom = int(rows.lower[y0]), int(rows.upper[y1 - 1]) + 1
        fields = table[b, top:bottom, strip.first : strip.first + num_cells].reshape(-1, width)
        # Along y: constant + slope_y · rel_y and slope_x of the lower and the upper cell, weighted, for each column.
        cells = ((cell_y[y0:y1] - top) * num_cells + torch.arange(num_cells, dtype=torch.int32)[:, None, None]) * 3
        factor = factor_y[y0:y1].expand(*cells.shape, 2)
        value = weighted_rows(fields, _reshaped(cells[..., None] + _CONSTANT_AND_SLOPE, 4), _reshaped(factor, 4))
        slope = weighted_rows(fields, _reshaped(cells + 2, 2), _reshaped(factor[..., 0], 2))
        value += shift  # the weights along x sum to 1
        # Along x: value + slope · rel_x of the two columns around each pixel, weighted.
        hidden = torch.mm(strip.value, value.reshape(num_cells, -1))
        hidden = hidden.addmm_(strip.slope, slope.reshape(num_cells, -1)).reshape(-1, width).relu_()
        for layer in layers:
            hidden = linear_relu(hidden, layer)
        pixels = torch.addmm(out.bias[:, None], out.weight, hidden.t())
        image[b, :, y0:y1, strip.start : strip.start + num_pixels] = pixels.reshape(3, num_pixels, -1).transpose(1, 2)

    for_each(evaluate, [(b, y, strip) for b in range(batch) for y in range(0, len(rows), num_rows) for strip in strips])
    return image


_CONSTANT_AND_SLOPE = torch.tensor([0, 1], dtype=torch.int32)
_STRIP_CELLS = 16
"""Columns of cells that the pixels of a strip lie between: the fewer, the fewer zeros in its weights; the more, the
fewer columns that two strips share."""


@dataclass(frozen=True)
class _Strip:
    """Pixels start.. of the columns, and the cells first.. they read; weights (pixels, cells) of value and slope."""

    start: int
    first: int
    value: Tensor
    slope: Tensor


def _strips(cols: Axis) -> list[_Strip]:
    """The columns of pixels in strips of about `_STRIP_CELLS` cells."""
    cells, factor = _two_cells(cols)
    span = int(cols.upper[-1]) - int(cols.lower[0]) + 1
    num_pixels = max(1, min(len(cols), _STRIP_CELLS * len(cols) // span))
    strips = []
    for start in range(0, len(cols), num_pixels):
        index = cells[start : start + num_pixels].long()
        first = int(index[0, 0])
        weights = factor.new_zeros(2, len(index), int(index[-1, 1]) - first + 1)
        weights.scatter_add_(
            2, (index - first).expand(2, *index.shape), factor[start : start + num_pixels].movedim(2, 0)
        )
        strips.append(_Strip(start, first, weights[0], weights[1]))
    return strips


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


def add_convolution_(total: Tensor, hidden: Tensor, conv: nn.Conv2d) -> Tensor:
    """total += conv(hidden), both (B,C,h,w) of one dtype, without gradient: one pass over `total` where oneDNN can."""
    if not _HAS_FUSED_CONVOLUTION or total.dtype == torch.float64 or conv.padding_mode != "zeros":
        return total.add_(conv(hidden))
    assert not isinstance(conv.padding, str)
    geometry = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        total, hidden, conv.weight, conv.bias, *geometry, "add", 1.0, None, [], ""
    )


_HAS_FUSED_CONVOLUTION = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
