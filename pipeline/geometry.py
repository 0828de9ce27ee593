"""Coordinates of output pixels relative to latent cells, in exact integer arithmetic.

An axis of n pixels lies over h cells. Pixel i has its centre at p = (2i+1)·h / 2n, measured in cells; cell k has its
centre at k + 1/2. Relative coordinates are 2·(p - k - 1/2): one cell spans two units (LIIF, Chen et al., CVPR 2021).
The numerators and denominators are integers, so no shift by a small constant is needed and nothing is lost in half
precision: only the final quotient is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.sizes import MAX_SIDE, Size, Window, check_size, check_window

__all__ = [
    "MAX_SIDE",
    "Axis",
    "Size",
    "Window",
    "axis_at",
    "axis_range",
    "check_index",
    "check_size",
    "check_window",
    "pixel_centres",
    "target_size",
]


@dataclass(frozen=True)
class Axis:
    """For Q positions along one axis: the two nearest cells (clamped to the edge), the relative coordinate to each,
    the blend weight of each (they sum to 1: the share of the opposite part), and 2·h/n, the pixel's size in cells."""

    lower: Tensor  # (...) int64
    upper: Tensor  # (...) int64
    rel_lower: Tensor  # (...) float
    rel_upper: Tensor  # (...) float
    weight_lower: Tensor  # (...) float
    weight_upper: Tensor  # (...) float
    cell: float

    def to(self, dtype: torch.dtype) -> Axis:
        """Coordinates and weights in another precision."""
        fields = ("rel_lower", "rel_upper", "weight_lower", "weight_upper")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in fields})

    def narrow(self, start: int, stop: int) -> Axis:
        """Positions start..stop-1 of the first dimension."""
        return self._indexed(slice(start, stop))

    def shifted(self, first: int) -> Axis:
        """The same places where cells are counted from cell `first`."""
        return replace(self, lower=self.lower - first, upper=self.upper - first) if first else self

    def as_column(self) -> Axis:
        """With one more dimension at the end, to broadcast against another axis."""
        return self._indexed((..., None))

    def sides(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """(cell, relative coordinate, blend weight) of the lower and of the upper neighbour."""
        return (self.lower, self.rel_lower, self.weight_lower), (self.upper, self.rel_upper, self.weight_upper)

    def _indexed(self, index: Any) -> Axis:
        return Axis(
            self.lower[index],
            self.upper[index],
            self.rel_lower[index],
            self.rel_upper[index],
            self.weight_lower[index],
            self.weight_upper[index],
            self.cell,
        )

    def __len__(self) -> int:
        return int(self.lower.shape[0])


def axis_at(index: Tensor, num_pixels: int, num_cells: int, dtype: torch.dtype = torch.float32) -> Axis:
    """Geometry of the pixels `index` (any shape, int64, 0..num_pixels-1) of an axis of num_pixels over num_cells."""
    n, h = num_pixels, num_cells
    position = (2 * index + 1) * h  # p · 2n
    lower = torch.div(position - n, 2 * n, rounding_mode="floor")
    upper = lower + 1
    lower, upper = lower.clamp(0, h - 1), upper.clamp(0, h - 1)
    rel_lower = (position - (2 * lower + 1) * n).double() / n
    rel_upper = (position - (2 * upper + 1) * n).double() / n
    # span is 2 between two cells. Where a pixel sits exactly on the centre of an edge cell, both neighbours are that
    # cell and span is 0: any weight is right there. (The released code then also loses the *other* axis' weights.)
    span = rel_lower.abs() + rel_upper.abs()
    weight_lower = torch.where(span > 0, rel_upper.abs() / span, 0.5)
    return Axis(
        lower,
        upper,
        rel_lower.to(dtype),
        rel_upper.to(dtype),
        weight_lower.to(dtype),
        (1.0 - weight_lower).to(dtype),
        2.0 * h / n,
    )


def axis_range(
    start: int, stop: int, num_pixels: int, num_cells: int, *, dtype: torch.dtype, device: torch.device
) -> Axis:
    """Geometry of the pixels start..stop-1."""
    return axis_at(torch.arange(start, stop, device=device), num_pixels, num_cells, dtype)


def check_index(index: Tensor, num_pixels: int, name: str) -> None:
    """`UserError` unless `index` holds whole numbers, each a pixel 0..num_pixels-1."""
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise UserError(f"{name} holds {index.dtype}; pixel indices are whole numbers")
    if index.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(index))
    if low < 0 or high >= num_pixels:
        raise UserError(f"{name} holds {low}..{high}; an output of {num_pixels} pixels has indices 0..{num_pixels - 1}")


def pixel_centres(num_pixels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Coordinates in [-1, 1] of pixel centres: -1 + (2i+1)/n, shape (n,)."""
    index = torch.arange(num_pixels, dtype=torch.float64)
    return ((2 * index + 1 - num_pixels) / num_pixels).to(dtype)


def target_size(size: Size, scale: float | None, target: Size | None) -> Size:
    """Output (H, W) from either a scale factor or an explicit size; exactly one must be given (`UserError`)."""
    if (scale is None) == (target is None):
        raise UserError("give either a scale or a size, not both and not neither")
    if target is not None:
        return check_size(target)
    assert scale is not None
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise UserError(f"scale = {scale!r} is not allowed; use a positive number")
    if not (scale > 0.0 and max(size) * scale < float("inf")):
        raise UserError(f"scale = {scale} is not allowed; use a positive number")
    return check_size((max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))
