"""f_theta, the paper's head: LIIF (Chen, Liu & Wang, CVPR 2021), rewritten exactly for speed.

Legend: B batch, K = h·w latent cells, Q output pixels of one chunk, D hidden width.
Input of the MLP for one pixel and one of its 4 nearest cells: feature (ch), relative coordinate (y, x), pixel size in
cells (y, x). Three things make it fast without changing the function:
  1. the first layer is linear in the feature: W_f · feature + bias is computed once a cell (the *table*) and gathered;
  2. on a grid, relative coordinates and blend weights are products of one vector a row and one a column;
  3. the blend of the 4 predictions is linear, as is the last layer, so hidden activations are blended before it.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.chunks import render_in_chunks
from pipeline.geometry import Axis
from pipeline.kernels import cpu
from pipeline.precision import without_autocast

CPU_CHUNK = 1024
"""Output pixels a chunk and thread: on a CPU the activations (4 corners × 1024 × 256 floats = 4 MB) stay in cache."""
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

    def macs_per_pixel(self, scale: float) -> float:
        """Multiply-accumulates an output pixel at `scale` pixels a cell and axis, the table's share included."""
        corner = 3 * self.width + (self.depth - 1) * self.width**2 + self.width  # position, layers, blend
        return 4 * corner + 3 * self.width + self.feature_channels * self.width / scale**2

    def grid(self, table: Tensor, rows: Axis, cols: Axis, *, chunk: int | None = None) -> Tensor:
        """All pixels rows × cols: table (B,h,w,D) → (B,3,len(rows),len(cols))."""
        with_grad = torch.is_grad_enabled() and (table.requires_grad or self.out.weight.requires_grad)
        if cpu.supports(table, with_grad):
            num_threads = torch.get_num_threads()
            return cpu.render_liif(
                table,
                rows,
                cols,
                self._later_layers(),
                self.out,
                self._position(),
                max(1, chunk // num_threads) if chunk else CPU_CHUNK,
            )
        if table.is_cuda and chunk is None:
            with torch.cuda.device(table.device):  # Triton launches on the current device, wherever the tensors are
                image = self._fused(table, rows, cols, with_grad)
            if image is not None:
                return image
        chunk = chunk or (CUDA_CHUNK if table.is_cuda else GRADIENT_CHUNK if with_grad else CPU_CHUNK)
        return render_in_chunks(self._block, table, rows, cols, chunk=chunk, with_grad=with_grad)

    def _fused(self, table: Tensor, rows: Axis, cols: Axis, with_grad: bool) -> Tensor | None:
        """The Triton kernel's image, or None where there is none for this shape or machine."""
        if importlib.util.find_spec("triton") is None:
            return None
        from pipeline.kernels import liif_triton, liif_triton_gradient

        if not liif_triton.supports(table, self.depth) or len(rows) * len(cols) >= 2**31:
            return None
        head = self._later_layers(), self.out, self._position()
        which: tuple[Hashable, ...] = (str(table.device), table.dtype, self.width, self.depth)
        if not with_grad:
            return _try_kernel(which, partial(liif_triton.render_liif, table, rows, cols, *head))
        # What fails only on the way back is too late for the plain path: try it on one pixel, once.
        which = *which, "gradient", self.out.weight.requires_grad
        if which not in _rehearsed and _try_kernel(which, partial(liif_triton_gradient.rehearse, table, *head)) is None:
            return None
        _rehearsed.add(which)
        return _try_kernel(which, partial(liif_triton_gradient.render_liif, table, rows, cols, *head))

    def points(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """Single pixels: table (B,h,w,D), axes with fields (B,Q) → (B,3,Q)."""
        batch, h, w, _ = table.shape
        first = torch.arange(batch, device=table.device)[:, None] * (h * w)
        shape = torch.broadcast_shapes((batch, 1), rows.lower.shape, cols.lower.shape)
        return self._corners(table, rows, cols, first, shape).reshape(batch, -1, 3).transpose(1, 2)

    def _block(self, table: Tensor, rows: Axis, cols: Axis) -> Tensor:
        """table (B,h,w,D) → (B,3,len(rows),len(cols))."""
        batch, h, w, _ = table.shape
        first = torch.arange(batch, device=table.device)[:, None, None] * (h * w)
        shape = (batch, len(rows), len(cols))
        return self._corners(table, rows.as_column(), cols, first, shape).reshape(*shape, 3).permute(0, 3, 1, 2)

    def _corners(self, table: Tensor, rows: Axis, cols: Axis, first: Tensor, shape: Sequence[int]) -> Tensor:
        """Fields of rows and cols and `first` (an image's first cell) broadcast to `shape`, Q places in all → (Q,3)."""
        w = table.shape[2]
        corners = [
            (first + y * w + x, rel_y, rel_x, weight_y * weight_x)
            for y, rel_y, weight_y in rows.sides()
            for x, rel_x, weight_x in cols.sides()
        ]
        cell, rel_y, rel_x, weight = (
            torch.stack([field.expand(shape) for field in fields]).reshape(4, -1) for fields in zip(*corners)
        )
        return self._mlp(table, cell, rel_y, rel_x, weight, rows.cell, cols.cell)

    def _later_layers(self) -> list[nn.Linear]:
        return [cast(nn.Linear, layer) for layer in list(self.hidden)[1:]]

    def _position(self) -> Tensor:
        """(D,4): what relative y and x and pixel size y and x add to the first layer."""
        return cast(nn.Linear, self.hidden[0]).weight[:, self.feature_channels :]

    def _mlp(
        self, table: Tensor, cell: Tensor, rel_y: Tensor, rel_x: Tensor, weight: Tensor, cell_y: float, cell_x: float
    ) -> Tensor:
        """table (B,h,w,D), the rest (4,Q) → (Q,3). Coordinates and blend are float32 whatever the layers are, as in the
        Triton kernel: halved, a coordinate is known to no more than 1/256 of a cell."""
        with without_autocast(table.device.type):
            weights = self._position().to(rel_y.dtype)
            shift = weights[:, 2] * cell_y + weights[:, 3] * cell_x
            rel = torch.stack([rel_y.reshape(-1), rel_x.reshape(-1), torch.ones_like(rel_x).reshape(-1)], dim=1)
            position = torch.stack([weights[:, 0], weights[:, 1], shift])
            gathered = table.reshape(-1, self.width).index_select(0, cell.reshape(-1)).to(rel.dtype)
            if torch.is_grad_enabled():
                hidden = torch.relu(torch.addmm(gathered, rel, position)).to(table.dtype)
            else:
                hidden = gathered.addmm_(rel, position).relu_().to(table.dtype)
        for layer in self._later_layers():
            hidden = torch.relu(layer(hidden)) if torch.is_grad_enabled() else layer(hidden).relu_()
        blended = (hidden.reshape(4, -1, self.width) * weight[:, :, None]).sum(0)
        return self.out(blended.to(table.dtype))


_failed: set[Hashable] = set()
_rehearsed: set[Hashable] = set()


def _try_kernel(which: Hashable, render: Callable[[], Tensor]) -> Tensor | None:
    """The kernel's result; None, with one warning, once `which` (device, type and shape) has failed in this process.
    Lack of memory is raised."""
    if which in _failed:
        return None
    try:
        return render()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and drivers raise all kinds
        _failed.add(which)
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        warnings.warn(f"the Triton kernel does not run here, going on without it: {reason}", stacklevel=2)
        return None
