"""A grid of output pixels evaluated block by block, so that memory is that of one block.

Legend: B batch, R × C output pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.geometry import Axis

Evaluate = Callable[[Tensor, Axis, Axis], Tensor]
"""(table (B,h,w,·), rows, columns) → pixels (B,3,len(rows),len(columns))."""


def render_in_chunks(
    evaluate: Evaluate, table: Tensor, rows: Axis, cols: Axis, *, chunk: int, with_grad: bool
) -> Tensor:
    """All pixels rows × cols, at most `chunk` of the whole batch at a time: rows, or parts of a row where one row is
    longer → (B,3,R,C). With gradient, several blocks are checkpointed: each is evaluated again for its gradient."""
    chunk = max(1, chunk // table.shape[0])
    num_cols = min(len(cols), chunk)
    num_rows = max(1, chunk // num_cols)
    if num_rows >= len(rows) and num_cols >= len(cols):
        return evaluate(table, rows, cols)
    image = None if with_grad else table.new_empty(table.shape[0], 3, len(rows), len(cols))
    strips = []
    for y0 in range(0, len(rows), num_rows):
        block_rows, strip = rows.narrow(y0, min(y0 + num_rows, len(rows))), []
        for x0 in range(0, len(cols), num_cols):
            block_cols = cols.narrow(x0, min(x0 + num_cols, len(cols)))
            if image is None:
                strip.append(checkpoint(evaluate, table, block_rows, block_cols, use_reentrant=False))
            else:
                block = evaluate(table, block_rows, block_cols)
                image[:, :, y0 : y0 + len(block_rows), x0 : x0 + len(block_cols)] = block
        strips.append(strip)
    return image if image is not None else torch.cat([torch.cat(strip, dim=3) for strip in strips], dim=2)
