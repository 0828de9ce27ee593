"""The `liif` head as one Triton kernel: gather, MLP and ensemble without leaving the chip. Forward only, CUDA.

A program takes P output pixels, that is 4·P rows (one a pixel and corner). Each corner's row of the table is gathered,
the relative coordinates' part added in float32, and every hidden layer is one product with the whole D × D matrix;
products take the table's type and accumulate in float32. The corners are blended in float32 before the last layer.

Legend: B images, R × C pixels each, D hidden width, L hidden layers after the first. Import only where Triton is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from pipeline.geometry import Axis

WIDTHS = (16, 32, 64, 128, 256)
_PADDED_OUT = 16
"""Columns of the last product: the smallest that a matrix instruction takes; 3 of them count."""


@dataclass(frozen=True)
class Launch:
    """How a program is cut: `pixels` a program, and warps."""

    pixels: int
    num_warps: int


def launch_for(width: int) -> Launch:
    """What fits the registers: the float32 results of 4 · pixels × width take half of a program's."""
    return Launch(32, 8) if width >= 256 else Launch(32, 4)


LAUNCHES = tuple(Launch(pixels, warps) for pixels in (16, 32, 64) for warps in (4, 8, 16))
"""What `latentzoom bench --only kernel` tries."""


def supports(table: Tensor, depth: int) -> bool:
    """Whether there is a kernel for a table (B,h,w,D) and an MLP of `depth` hidden layers."""
    return (
        table.shape[-1] in WIDTHS
        and 1 <= depth <= 8
        and table.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and table.shape[:3].numel() < 2**31
    )


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
    batch, h, w, width = table.shape
    launch = launch or launch_for(width)
    num_rows, num_cols = len(rows), len(cols)
    image = table.new_empty(batch, 3, num_rows, num_cols)
    first = position.float()
    shift = first[:, 2] * rows.cell + first[:, 3] * cols.cell
    if layers:
        weights = torch.stack([layer.weight.t() for layer in layers]).contiguous()
        biases = torch.stack([layer.bias for layer in layers]).float().contiguous()
    else:
        weights, biases = table.new_zeros(1), first.new_zeros(1)
    last = out.weight.new_zeros(width, _PADDED_OUT)
    last[:, :3] = out.weight.t()
    num_pixels = batch * num_rows * num_cols
    _kernel[(triton.cdiv(num_pixels, launch.pixels),)](
        table.contiguous(), *_fields(rows, w), *_fields(cols, 1), first[:, 0].contiguous(), first[:, 1].contiguous(),
        shift, weights, biases, last, out.bias.float(), image, num_pixels, num_rows, num_cols, h * w,
        D=width, L=len(layers), P=launch.pixels, OUT=_PADDED_OUT,
        PRECISION="ieee" if table.dtype == torch.float32 else None, num_warps=launch.num_warps,
    )  # fmt: skip
    return image


def _fields(axis: Axis, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n,2) each: the lower and upper neighbour's offset in the table, relative coordinate and blend weight."""
    cell = torch.stack([axis.lower, axis.upper], dim=1).to(torch.int32) * stride
    rel = torch.stack([axis.rel_lower, axis.rel_upper], dim=1).float()
    return cell, rel, torch.stack([axis.weight_lower, axis.weight_upper], dim=1).float()


@triton.jit
def _kernel(
    table, cell_y, rel_y, weight_y, cell_x, rel_x, weight_x, position_y, position_x, shift,
    weights, biases, last, last_bias, image, num_pixels, num_rows, num_cols, num_cells,
    D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype = table.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * P
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
    hidden = tl.maximum(hidden, 0.0)
    for layer in tl.static_range(L):
        matrix = tl.load(weights + layer * D * D + column[:, None] * D + column[None, :])
        bias = tl.load(biases + layer * D + column)
        hidden = tl.dot(hidden.to(dtype), matrix, input_precision=PRECISION) + bias[None, :]
        hidden = tl.maximum(hidden, 0.0)
    blended = tl.sum(tl.reshape(hidden * weight[:, None], (P, 4, D)), axis=1)
    channel = tl.arange(0, OUT)
    matrix = tl.load(last + column[:, None] * OUT + channel[None, :])
    colour = tl.dot(blended.to(dtype), matrix, input_precision=PRECISION)
    colour += tl.load(last_bias + channel, mask=channel < 3, other=0.0)[None, :]
    pixel = start + tl.arange(0, P)
    b, inside = pixel // (num_rows * num_cols), pixel % (num_rows * num_cols)
    target = image + (b * 3 * num_rows * num_cols + inside)[:, None] + channel[None, :] * (num_rows * num_cols)
    mask = (pixel < num_pixels)[:, None] & (channel < 3)[None, :]
    tl.store(target, colour.to(dtype), mask=mask)
