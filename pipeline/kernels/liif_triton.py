"""The `liif` head as one Triton kernel: gather, MLP and ensemble without leaving the chip. CUDA.

A program takes P output pixels, that is 4·P rows (one a pixel and corner). Each corner's row of the table is gathered,
the relative coordinates' part added in float32, and every hidden layer is one product with the whole D × D matrix;
products take the table's type and accumulate in float32. The corners are blended in float32 before the last layer.

Its gradient is in liif_triton_gradient.py. Legend: B images, R × C pixels each, D hidden width, L hidden layers after
the first. Import only where Triton is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from pipeline.geometry import Axis

WIDTHS = (16, 32, 64, 128, 256)
DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
"""Not float32: its products do not run on matrix units; unrolled, they compile for minutes and spill their registers.
The plain path is faster."""
PADDED_OUT = 16
"""Columns of the last product: the smallest that a matrix instruction takes; 3 of them count."""

SIZES = ("num_rows", "num_cols", "num_cells")
"""Arguments of every kernel that change with the picture. Training draws them anew for every step: each mixture of such
that 16 divides and such that it does not would be a kernel of its own, compiled while the GPU waits."""


@dataclass(frozen=True)
class Launch:
    """How a program is cut: `pixels` a program, and warps."""

    pixels: int
    num_warps: int


def launch_for(width: int) -> Launch:
    """What fits the registers, on the way from memory a whole matrix too, and the shared memory of an A100; `ahead`
    checks it."""
    return Launch(16, 8) if width >= 256 else Launch(32, 8 if width >= 128 else 4)


LAUNCHES = tuple(Launch(pixels, warps) for pixels in (16, 32, 64) for warps in (4, 8, 16))
"""What `latentzoom bench --only kernel` tries."""


def supports(table: Tensor, depth: int) -> bool:
    """Whether there is a kernel for a table (B,h,w,D) and an MLP of `depth` hidden layers."""
    return table.shape[-1] in WIDTHS and 1 <= depth <= 8 and table.dtype in DTYPES and table.shape[:3].numel() < 2**31


def render_liif(
    table: Tensor,
    rows: Axis,
    cols: Axis,
    layers: list[nn.Linear],
    out: nn.Linear,
    position: Tensor,
    launch: Launch | None = None,
) -> Tensor:
    """As `cpu.render_liif`: table (B,h,w,D), layers after the first, position (D,4) → (B,3,len(rows),len(cols))."""
    operands = Operands.of(rows.cell, cols.cell, layers, out, position, table.dtype)
    return forward(table.contiguous(), operands, Grid.of(table, rows, cols), launch)


@dataclass(frozen=True)
class Operands:
    """The head's weights as the kernels take them: all but the matrices in float32."""

    position_y: Tensor  # (D,)
    position_x: Tensor  # (D,)
    shift: Tensor  # (D,): what the pixel's size adds
    weights: Tensor  # (L,D,D), input by output, in the table's type
    biases: Tensor  # (L,D)
    last: Tensor  # (D,3), in the table's type
    last_bias: Tensor  # (3,)

    @staticmethod
    def of(
        cell_y: float, cell_x: float, layers: list[nn.Linear], out: nn.Linear, position: Tensor, dtype: torch.dtype
    ) -> Operands:
        """With the gradient of each parameter."""
        first, width = position.float(), position.shape[0]
        weights, biases = first.new_zeros(0, width, width), first.new_zeros(0, width)
        if layers:
            weights = torch.stack([layer.weight.t() for layer in layers])
            biases = torch.stack([layer.bias for layer in layers])
        return Operands(
            first[:, 0].contiguous(),
            first[:, 1].contiguous(),
            first[:, 2] * cell_y + first[:, 3] * cell_x,
            weights.to(dtype).contiguous(),
            biases.float().contiguous(),
            out.weight.t().to(dtype),
            out.bias.float(),
        )


@dataclass(frozen=True)
class Grid:
    """Where the pixels lie: for each row and column of the output (n,2) offsets in the table of the lower and upper
    neighbour, relative coordinates and blend weights; and how many images, rows, columns and cells an image."""

    row_fields: tuple[Tensor, Tensor, Tensor]
    col_fields: tuple[Tensor, Tensor, Tensor]
    num_images: int
    num_rows: int
    num_cols: int
    num_cells: int

    @staticmethod
    def of(table: Tensor, rows: Axis, cols: Axis) -> Grid:
        batch, h, w, _ = table.shape
        return Grid(_fields(rows, w), _fields(cols, 1), batch, len(rows), len(cols), h * w)

    @property
    def num_pixels(self) -> int:
        return self.num_images * self.num_rows * self.num_cols

    def arguments(self) -> tuple[Any, ...]:
        """As every kernel takes them."""
        return *self.row_fields, *self.col_fields, self.num_rows, self.num_cols, self.num_cells


def forward(table: Tensor, operands: Operands, grid: Grid, launch: Launch | None = None) -> Tensor:
    """Table (B,h,w,D), contiguous → image (B,3,R,C) in its type."""
    width = table.shape[-1]
    launch = launch or launch_for(width)
    image = table.new_empty(grid.num_images, 3, grid.num_rows, grid.num_cols)
    _kernel[(triton.cdiv(grid.num_pixels, launch.pixels),)](
        table, *grid.arguments(), operands.position_y, operands.position_x, operands.shift, operands.weights,
        operands.biases, padded(operands.last), operands.last_bias, image, grid.num_pixels,
        D=width, L=len(operands.biases), P=launch.pixels, OUT=PADDED_OUT, PRECISION=precision(table.dtype),
        num_warps=launch.num_warps,
    )  # fmt: skip
    return image


def padded(last: Tensor) -> Tensor:
    """The last layer's matrix (D,3) with zeros up to PADDED_OUT columns."""
    return torch.nn.functional.pad(last, (0, PADDED_OUT - 3)).contiguous()


def precision(dtype: torch.dtype) -> str | None:
    """How products of float32 are done: exactly."""
    return "ieee" if dtype == torch.float32 else None


def _fields(axis: Axis, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n,2) each: the lower and upper neighbour's offset in the table, relative coordinate and blend weight."""
    cell = torch.stack([axis.lower, axis.upper], dim=1).to(torch.int32) * stride
    rel = torch.stack([axis.rel_lower, axis.rel_upper], dim=1).float()
    return cell, rel, torch.stack([axis.weight_lower, axis.weight_upper], dim=1).float()


@triton.jit
def first_layer(
    table, cell_y, rel_y, weight_y, cell_x, rel_x, weight_x, num_rows, num_cols, num_cells,
    position_y, position_x, shift, start, num_pixels, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """For the 4 · P rows of pixels start..start+P-1 (the last one again where there are no more): the cell's number
    (4P,), the blend weight (4P,), and the first hidden layer (4P,D) in float32."""
    row = tl.arange(0, 4 * P)
    pixel = tl.minimum(start + row // 4, num_pixels - 1)
    b, y, x = pixel // (num_rows * num_cols), pixel // num_cols % num_rows, pixel % num_cols
    side_y, side_x = row % 4 // 2, row % 2
    cell = b * num_cells + tl.load(cell_y + 2 * y + side_y) + tl.load(cell_x + 2 * x + side_x)
    weight = tl.load(weight_y + 2 * y + side_y) * tl.load(weight_x + 2 * x + side_x)
    column = tl.arange(0, D)
    hidden = tl.load(table + cell[:, None] * D + column[None, :]).to(tl.float32) + tl.load(shift + column)[None, :]
    hidden += tl.load(rel_y + 2 * y + side_y)[:, None] * tl.load(position_y + column)[None, :]
    hidden += tl.load(rel_x + 2 * x + side_x)[:, None] * tl.load(position_x + column)[None, :]
    return cell, weight, tl.maximum(hidden, 0.0)


@triton.jit
def later_layer(hidden, weights, biases, layer, D: tl.constexpr, PRECISION: tl.constexpr):
    """Hidden layer `layer` after the first, on (·,D) in float32."""
    column = tl.arange(0, D)
    matrix = tl.load(weights + layer * D * D + column[:, None] * D + column[None, :])
    bias = tl.load(biases + layer * D + column)
    return tl.maximum(tl.dot(hidden.to(matrix.dtype), matrix, input_precision=PRECISION) + bias[None, :], 0.0)


@triton.jit
def blend(hidden, weight, D: tl.constexpr, P: tl.constexpr):
    """The 4 corners of each pixel: (4P,D) → (P,D)."""
    return tl.sum(tl.reshape(hidden * weight[:, None], (P, 4, D)), axis=1)


@triton.jit
def colour_pointers(image, start, num_pixels, num_rows, num_cols, P: tl.constexpr, OUT: tl.constexpr):
    """Where the colours (P,OUT) of pixels start..start+P-1 lie in image (B,3,R,C), and which of them are there."""
    pixel, channel = start + tl.arange(0, P), tl.arange(0, OUT)
    b, inside = pixel // (num_rows * num_cols), pixel % (num_rows * num_cols)
    place = (
        image + (b * 3 * num_rows * num_cols + inside)[:, None] + channel[None, :].to(tl.int64) * (num_rows * num_cols)
    )
    return place, (pixel < num_pixels)[:, None] & (channel < 3)[None, :]


@triton.jit(do_not_specialize=[*SIZES, "num_pixels", "L"])  # one kernel for every depth, whose loops stay loops
def _kernel(
    table, cell_y, rel_y, weight_y, cell_x, rel_x, weight_x, num_rows, num_cols, num_cells,
    position_y, position_x, shift, weights, biases, last, last_bias, image, num_pixels,
    L, D: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * P
    _, weight, hidden = first_layer(
        table, cell_y, rel_y, weight_y, cell_x, rel_x, weight_x, num_rows, num_cols, num_cells,
        position_y, position_x, shift, start, num_pixels, D, P,
    )  # fmt: skip
    # A loop, not unrolled: the compiler would fetch the next layers' matrices ahead, and has no registers for them.
    for layer in tl.range(L, num_stages=1):
        hidden = later_layer(hidden, weights, biases, layer, D, PRECISION)
    channel = tl.arange(0, OUT)
    matrix = tl.load(last + tl.arange(0, D)[:, None] * OUT + channel[None, :])
    colour = tl.dot(blend(hidden, weight, D, P).to(matrix.dtype), matrix, input_precision=PRECISION)
    colour += tl.load(last_bias + channel, mask=channel < 3, other=0.0)[None, :]
    place, is_there = colour_pointers(image, start, num_pixels, num_rows, num_cols, P, OUT)
    tl.store(place, colour.to(image.dtype.element_ty), mask=is_there)
