"""LIIF as the paper describes it, with no shortcut: what the fast head must compute.

Every corner of every pixel samples its feature with `grid_sample`, concatenates relative coordinate and cell, and goes
through the whole MLP; the four results are blended by area. Coordinates are floats in [-1, 1], nudged by 1e-6 so that a
pixel between two cells falls into one of them, which is why this is exact in float32 and float64 only.

Tests compare with it and `latentzoom bench` measures against it; nothing else uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    axes = [(torch.arange(n, dtype=features.dtype, device=features.device) * 2 + 1) / n - 1 for n in size]
    y0, x0, y1, x1 = window or (0, 0, *size)
    axes = [axes[0][y0:y1], axes[1][x0:x1]]
    coord = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)
    parts = [query_reference(head, features, coord[i : i + chunk], size) for i in range(0, len(coord), chunk)]
    return torch.cat(parts, dim=1).transpose(1, 2).reshape(len(features), 3, y1 - y0, x1 - x0)


def query_reference(head: LiifHead, features: Tensor, coord: Tensor, size: tuple[int, int]) -> Tensor:
    """Single places of an output of `size`: coord (Q,2) in [-1, 1], y before x → (B,Q,3)."""
    batch, _, h, w = features.shape
    sides = torch.tensor([h, w], dtype=coord.dtype, device=coord.device)
    cell = (2 / torch.tensor(size, dtype=coord.dtype, device=coord.device)) * sides
    outputs, areas = [], []
    for dy in (-1, 1):
        for dx in (-1, 1):
            shifted = coord + torch.tensor([dy, dx], dtype=coord.dtype, device=coord.device) / sides + _NUDGE
            shifted = shifted.clamp(-1 + _NUDGE, 1 - _NUDGE)
            feature = _nearest(features, shifted)
            centre = _nearest(_centres(features), shifted)
            relative = (coord - centre) * sides
            inputs = torch.cat([feature, relative, cell.expand(batch, len(coord), 2)], dim=-1)
            outputs.append(_mlp(head, inputs))
            areas.append((relative[..., 0] * relative[..., 1]).abs() + 1e-9)
    total = torch.stack(areas).sum(0)
    return sum(out * (area / total)[..., None] for out, area in zip(outputs, reversed(areas)))  # type: ignore[return-value]


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
