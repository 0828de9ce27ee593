"""The heads as their papers describe them, with no shortcut: what the fast ones must compute.

Every corner of every pixel samples its feature (for `light`, its linear field) with `grid_sample`. For `liif` it is
concatenated with relative coordinate and cell and goes through the whole MLP, and the four results are blended by area;
for `light` the four fields' values are blended by area, and one MLP follows. Coordinates are floats in [-1, 1], nudged
by 1e-6 so that a pixel between two cells falls into one of them: that is exact in float32 and float64 only.

Tests compare with it and `latentzoom bench` measures against it; nothing else uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.light import LightHead
from pipeline.liif import LiifHead

_NUDGE = 1e-6


def render_reference(
    head: LiifHead,
    features: Tensor,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
    *,
    chunk: int = 30_000,
) -> Tensor:
    """features (B,ch,h,w) → image (B,3,H,W) or the window (y0,x0,y1,x1) of it, `chunk` pixels at a time.

    Where a pixel falls exactly on the centre of an edge cell (as all do when H = h), both of its neighbours along that
    axis are that cell, all four areas are zero and the result is 0/0 but for the 1e-9 added: leave such sizes out.
    """
    return _render(lambda coord: query_reference(head, features, coord, size), features, size, window, chunk)


def render_light_reference(
    head: LightHead,
    features: Tensor,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
    *,
    chunk: int = 30_000,
) -> Tensor:
    """As `render_reference`, for the light head."""
    return _render(lambda coord: query_light_reference(head, features, coord, size), features, size, window, chunk)


def query_reference(head: LiifHead, features: Tensor, coord: Tensor, size: tuple[int, int]) -> Tensor:
    """Single places of an output of `size`: coord (Q,2) in [-1, 1], y before x → (B,Q,3)."""
    cell = _cell(features, size).expand(len(features), len(coord), 2)
    result = features.new_zeros(())
    for feature, relative, share in _corners(features, coord):
        result = result + share * _mlp(head, torch.cat([feature, relative, cell], dim=-1))
    return result


def query_light_reference(head: LightHead, features: Tensor, coord: Tensor, size: tuple[int, int]) -> Tensor:
    """As `query_reference`: with the field A + Y·rel_y + X·rel_x of each of the 4 nearest cells, blended, plus the
    pixel size's part, through the narrow MLP."""
    blended = features.new_zeros(())
    for field, relative, share in _corners(head.field(features), coord):
        constant, slope_y, slope_x = field.chunk(3, dim=-1)
        blended = blended + share * (constant + slope_y * relative[..., :1] + slope_x * relative[..., 1:])
    hidden = torch.relu(blended + head.pixel_size(_cell(features, size)))
    for layer in head.hidden:
        hidden = torch.relu(layer(hidden))
    return head.out(hidden)


def _render(
    query: Callable[[Tensor], Tensor],
    features: Tensor,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None,
    chunk: int,
) -> Tensor:
    axes = [(torch.arange(n, dtype=features.dtype, device=features.device) * 2 + 1) / n - 1 for n in size]
    y0, x0, y1, x1 = window or (0, 0, *size)
    coord = torch.stack(torch.meshgrid(axes[0][y0:y1], axes[1][x0:x1], indexing="ij"), dim=-1).reshape(-1, 2)
    parts = [query(coord[i : i + chunk]) for i in range(0, len(coord), chunk)]
    return torch.cat(parts, dim=1).transpose(1, 2).reshape(len(features), 3, y1 - y0, x1 - x0)


def _corners(grid: Tensor, coord: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each of the 4 cells of grid (B,c,h,w) around coord (Q,2): its values (B,Q,c), the relative coordinate
    (B,Q,2), and the share (B,Q,1) of the rectangle opposite to it."""
    sides = torch.tensor(grid.shape[2:], dtype=coord.dtype, device=coord.device)
    places, relatives, areas = [], [], []
    for dy in (-1, 1):
        for dx in (-1, 1):
            shifted = coord + torch.tensor([dy, dx], dtype=coord.dtype, device=coord.device) / sides + _NUDGE
            shifted = shifted.clamp(-1 + _NUDGE, 1 - _NUDGE)
            places.append(shifted)
            relatives.append((coord - _nearest(_centres(grid), shifted)) * sides)
            areas.append((relatives[-1][..., 0] * relatives[-1][..., 1]).abs() + 1e-9)
    total = torch.stack(areas).sum(0)
    for place, relative, opposite in zip(places, relatives, reversed(areas)):
        yield _nearest(grid, place), relative, (opposite / total)[..., None]


def _cell(features: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixel's size in half cells, (2,)."""
    sides, pixels = (features.new_tensor([float(n) for n in each]) for each in (features.shape[2:], size))
    return 2 / pixels * sides


def _mlp(head: LiifHead, inputs: Tensor) -> Tensor:
    for layer in head.hidden:
        inputs = torch.relu(layer(inputs))
    return head.out(inputs)


def _nearest(grid: Tensor, coord: Tensor) -> Tensor:
    """The value of grid (B,c,h,w) in the cell that holds each coord (Q,2), y before x → (B,Q,c)."""
    places = coord.flip(-1).expand(len(grid), 1, -1, 2)
    return F.grid_sample(grid, places, mode="nearest", align_corners=False)[:, :, 0].transpose(1, 2)


def _centres(features: Tensor) -> Tensor:
    """Coordinates of the cells' centres, (B,2,h,w)."""
    axes = [(torch.arange(n, dtype=features.dtype, device=features.device) * 2 + 1) / n - 1 for n in features.shape[2:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(features), -1, -1, -1)
