"""The gradient of the fused `liif` head, itself fused: activations are computed again, never kept. CUDA.

A program takes P pixels as in liif_triton.py. It computes the hidden layers again and keeps of each unit only whether
it was above zero, one bit a layer; with those bits the gradient runs back through the transposed matrices and is added
to the table's, in float32 (cells are shared by many pixels: atomic additions, whose order is not fixed, so the last
bits differ from run to run). With a frozen head, as in alignment stage 2, that is all.

Where the weights learn, the kernel also writes activations and gradients of a part of the pixels, and the weights'
gradients are products of those: sums over parts, accumulated in float32.

On chip at D = 256 in half precision: one matrix (128 KB) and the rows of 8 pixels (16 KB), of the 163 KB that a program
may have on an A100; each of 256 threads holds 32 float32 results, 32 words of bits and, on its way to shared memory,
its part of the matrix. 16 pixels would spill some hundred bytes a thread; `ahead` has the figures. Legend as in
liif_triton.py; N = 4 · pixels rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from pipeline.geometry import Axis, axis_range
from pipeline.kernels.liif_triton import (
    PADDED_OUT,
    SIZES,
    Grid,
    Launch,
    Operands,
    colour_pointers,
    first_layer,
    forward,
    later_layer,
    padded,
    precision,
)

PART = 1 << 16
"""Pixels whose activations are written at once where the weights learn: 2 · (L + 1) · 4 · PART · D numbers."""


def launch_for(width: int) -> Launch:
    """See above for what this takes at width 256."""
    return Launch(8, 8) if width >= 256 else Launch(16, 8 if width >= 64 else 4)


def render_liif(
    table: Tensor, rows: Axis, cols: Axis, layers: list[nn.Linear], out: nn.Linear, position: Tensor
) -> Tensor:
    """As `liif_triton.render_liif`, with gradient for the table and every parameter that requires it."""
    operands = Operands.of(rows.cell, cols.cell, layers, out, position, table.dtype)
    grid = Grid.of(table, rows, cols)
    return _Render.apply(grid, table.contiguous(), *(getattr(operands, name) for name in Operands.__annotations__))


def rehearse(table: Tensor, layers: list[nn.Linear], out: nn.Linear, position: Tensor) -> Tensor:
    """A small image over a few cells like the table's, after its gradient: to find out whether that compiles and fits
    here. Parameters' own gradients stay as they are. Raises what compilers and drivers raise."""
    cells = table.new_zeros(1, 2, 3, table.shape[-1], requires_grad=True)
    rows, cols = (axis_range(0, n, n, k, dtype=torch.float32, device=table.device) for n, k in ((3, 2), (5, 3)))
    with torch.enable_grad():
        image = render_liif(cells, rows, cols, layers, out, position)
    learned = [p for p in (position, out.weight, *(layer.weight for layer in layers)) if p.requires_grad]
    torch.autograd.grad(image.sum(), [cells, *learned])
    return image.detach()


class _Render(torch.autograd.Function):
    """(grid, table, position_y, position_x, shift, weights, biases, last, last_bias) → image."""

    @staticmethod
    def forward(ctx: FunctionCtx, grid: Grid, table: Tensor, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(table, *operands)
        ctx.grid = grid  # type: ignore[attr-defined]
        return forward(table, Operands(*operands), grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_image: Tensor) -> tuple[Tensor | None, ...]:
        table, *saved = ctx.saved_tensors
        operands, grad_image = Operands(*saved), grad_image.contiguous()
        grad_table = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
        if not any(ctx.needs_input_grad[2:]):
            _launch(table, operands, ctx.grid, grad_image, grad_table)
            return None, grad_table.to(table.dtype), *[None] * 7
        sums = _learn(table, operands, ctx.grid, grad_image, grad_table)
        return None, grad_table.to(table.dtype), *(s.to(like.dtype) for s, like in zip(sums, saved))


def _launch(
    table: Tensor,
    operands: Operands,
    grid: Grid,
    grad_image: Tensor,
    grad_table: Tensor,
    part: tuple[int, int] | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add to grad_table (B,h,w,D) float32 what the pixels of `part` (all of them) do. `kept`: where to write their
    activations and the gradients of the sums before each ReLU, both (L+1,N,D)."""
    width, (first, stop) = table.shape[-1], part or (0, grid.num_pixels)
    launch, empty = launch_for(width), table.new_empty(0)
    activations, gradients = kept or (empty, empty)
    _kernel[(triton.cdiv(stop - first, launch.pixels),)](
        table, *grid.arguments(), operands.position_y, operands.position_x, operands.shift, operands.weights,
        operands.biases, operands.weights.transpose(1, 2).contiguous(), padded(operands.last),
        grad_image, grad_table, activations, gradients, first, stop,
        D=width, L=len(operands.biases), P=launch.pixels, OUT=PADDED_OUT, PRECISION=precision(table.dtype),
        KEEP=kept is not None, num_warps=launch.num_warps,
    )  # fmt: skip


def _learn(table: Tensor, operands: Operands, grid: Grid, grad_image: Tensor, grad_table: Tensor) -> list[Tensor]:
    """The gradients of the operands, in their order, float32; and the table's is added to grad_table."""
    num_layers, width = operands.biases.shape
    sums = [torch.zeros_like(operand, dtype=torch.float32) for operand in vars(operands).values()]
    position_y, position_x, shift, weights, biases, last, last_bias = sums
    colours = grad_image.permute(0, 2, 3, 1).reshape(-1, 3)
    for first in range(0, grid.num_pixels, PART):
        stop = min(first + PART, grid.num_pixels)
        kept = tuple(table.new_empty(num_layers + 1, 4 * (stop - first), width) for _ in range(2))
        _launch(table, operands, grid, grad_image, grad_table, (first, stop), kept)  # type: ignore[arg-type]
        activations, gradients = kept
        for layer in range(num_layers):
            weights[layer] += activations[layer].t() @ gradients[layer + 1]
            biases[layer] += gradients[layer + 1].sum(0, dtype=torch.float32)
        rel_y, rel_x, weight = _corner_fields(grid, first, stop)
        start = gradients[0].float()
        position_y += rel_y @ start
        position_x += rel_x @ start
        shift += start.sum(0)
        blended = (activations[-1].float() * weight[:, None]).reshape(-1, 4, width).sum(1)
        last += blended.t() @ colours[first:stop].float()
        last_bias += colours[first:stop].sum(0, dtype=torch.float32)
    return sums


def _corner_fields(grid: Grid, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Relative y, relative x and blend weight of the rows of pixels first..stop-1, (N,) each."""
    (_, rel_y, weight_y), (_, rel_x, weight_x) = grid.row_fields, grid.col_fields
    pixel = torch.arange(first, stop, device=rel_y.device)
    y, x = pixel // grid.num_cols % grid.num_rows, pixel % grid.num_cols

    def spread(of_y: Tensor, of_x: Tensor) -> tuple[Tensor, Tensor]:
        shape = len(pixel), 2, 2
        return of_y[y][:, :, None].expand(shape).reshape(-1), of_x[x][:, None, :].expand(shape).reshape(-1)

    by_y, by_x = spread(weight_y, weight_x)
    return *spread(rel_y, rel_x), by_y * by_x


@triton.jit(do_not_specialize=[*SIZES, "first", "stop", "L"])  # one kernel for every depth, whose loops stay loops
def _kernel(
    table, cell_y, rel_y, weight_y, cell_x, rel_x, weight_x, num_rows, num_cols, num_cells,
    position_y, position_x, shift, weights, biases, transposed, last,
    grad_image, grad_table, activations, gradients, first, stop,
    L, D: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    start = first + tl.program_id(0).to(tl.int64) * P
    row, column, channel = tl.arange(0, 4 * P), tl.arange(0, D), tl.arange(0, OUT)
    is_row = (start + row // 4 < stop)[:, None]
    # Of one part: at most PART · 4 · D · (L + 1) numbers, which 32 bits count.
    num_kept = (4 * (stop - first)).to(tl.int32)
    kept = (4 * tl.program_id(0) * P + row)[:, None] * D + column[None, :]
    cell, weight, hidden = first_layer(
        table, cell_y, rel_y, weight_y, cell_x, rel_x, weight_x, num_rows, num_cols, num_cells,
        position_y, position_x, shift, start, stop, D, P,
    )  # fmt: skip
    alive = (hidden > 0.0).to(tl.int32)
    if KEEP:
        tl.store(activations + kept, hidden.to(activations.dtype.element_ty), mask=is_row)
    # Loops, not unrolled: the compiler would fetch every layer's matrix ahead, and has no room for them.
    for layer in tl.range(L, num_stages=1):
        hidden = later_layer(hidden, weights, biases, layer, D, PRECISION)
        alive |= (hidden > 0.0).to(tl.int32) << (layer + 1)
        if KEEP:
            tl.store(
                activations + (layer + 1) * num_kept * D + kept, hidden.to(activations.dtype.element_ty), mask=is_row
            )
    place, is_there = colour_pointers(grad_image, start, stop, num_rows, num_cols, P, OUT)
    matrix = tl.load(last + column[:, None] * OUT + channel[None, :])
    colour = tl.load(place, mask=is_there, other=0.0).to(matrix.dtype)
    blended = tl.dot(colour, tl.trans(matrix), input_precision=PRECISION)
    grad = tl.reshape(tl.broadcast_to(blended[:, None, :], (P, 4, D)), (4 * P, D)) * weight[:, None]
    for back in tl.range(L, num_stages=1):
        grad = tl.where((alive >> (L - back)) & 1 == 1, grad, 0.0)
        if KEEP:
            tl.store(gradients + (L - back) * num_kept * D + kept, grad.to(gradients.dtype.element_ty), mask=is_row)
        # Not `weights` transposed: the compiler may keep what it has loaded on the way forward, 128 KB a layer.
        square = tl.load(transposed + (L - 1 - back) * D * D + column[:, None] * D + column[None, :])
        grad = tl.dot(grad.to(square.dtype), square, input_precision=PRECISION)
    grad = tl.where(alive & 1 == 1, grad, 0.0)
    if KEEP:
        tl.store(gradients + kept, grad.to(gradients.dtype.element_ty), mask=is_row)
    tl.atomic_add(grad_table + cell[:, None] * D + column[None, :], grad, mask=is_row, sem="relaxed")
