"""Windows of a resized picture without resizing the whole. Legend: h/w source pixels, H/W target pixels, c channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pipeline.geometry import Size, Window


def resize_window(
    image: Tensor, size: Size, window: Window, mode: Literal["bicubic", "nearest_released"] = "bicubic"
) -> Tensor:
    """image (B,c,h,w) → the window (y0,x0,y1,x1) of it resized to `size`; equals the crop of `resize.resize`, which is
    anti-aliased, or of `resize.resize_nearest_released`. Only the source pixels it needs are read. uint8 is rounded."""
    y0, x0, y1, x1 = window
    if tuple(image.shape[-2:]) == tuple(size):
        return image[:, :, y0:y1, x0:x1]
    if mode == "nearest_released":
        rows, cols = (
            torch.arange(start, stop, device=image.device) * source // target
            for start, stop, source, target in (
                (y0, y1, image.shape[2], size[0]),
                (x0, x1, image.shape[3], size[1]),
            )
        )
        return image[:, :, rows[:, None], cols[None, :]]
    top, along_y = _bicubic(y0, y1, image.shape[2], size[0])
    left, along_x = _bicubic(x0, x1, image.shape[3], size[1])
    part = image[:, :, top : top + along_y.shape[1], left : left + along_x.shape[1]].float()
    made = along_y.to(part) @ part @ along_x.to(part).t()
    return made.round_().clamp_(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else made.to(image.dtype)


BLOCK = 1024
"""Height and width of what is drawn at once for `reduced_window`."""


def drawn_size(size: Size, cells: Size) -> Size:
    """Pixels (H, W) at which a latent of `cells` is drawn for an output of `size`. A pixel larger than a cell would
    miss what lies between its centre and the next (decoders are trained with pixels of at most a cell): then a whole
    multiple of the output, of at least one and a half pixels a cell, to be reduced. With pixels as large as cells,
    photographs at half and a quarter of their size were up to 12 dB further from an anti-aliased bicubic (and a zone
    plate up to 3.5 dB closer). Two pixels a cell cost 1.8 times as much and came no closer: a zone plate 0.2 to 1.6 dB
    further, photographs within 0.9 dB to either side; three up to 4 dB further."""
    height, width = (side if side >= num else side * -(-3 * num // (2 * side)) for side, num in zip(size, cells))
    return height, width


def reduced_window(draw: Callable[[Window], Tensor], drawn: Size, size: Size, window: Window) -> Tensor:
    """The window (y0,x0,y1,x1) of a picture drawn at `drawn` and reduced to `size`, as `resize.resize` would the whole.
    draw: a window of the drawn picture → (B,c,·,·). It is drawn block by block and summed up, in bounded memory."""
    if drawn == size:
        return draw(window)
    (top, along_y), (left, along_x) = (
        _bicubic(window[axis], window[axis + 2], drawn[axis], size[axis])
        if drawn[axis] != size[axis]
        else (window[axis], torch.eye(window[axis + 2] - window[axis], dtype=torch.float64))
        for axis in (0, 1)
    )
    total: Tensor | None = None
    for y in range(0, along_y.shape[1], BLOCK):
        rows = along_y[:, y : y + BLOCK]
        for x in range(0, along_x.shape[1], BLOCK):
            cols = along_x[:, x : x + BLOCK]
            part = draw((top + y, left + x, top + y + rows.shape[1], left + x + cols.shape[1])).float()
            reduced = rows.to(part) @ part @ cols.to(part).t()
            total = reduced if total is None else total.add_(reduced)
    assert total is not None
    return total


def _bicubic(start: int, stop: int, num_source: int, num_target: int) -> tuple[int, Tensor]:
    """(first source pixel, weights (stop-start, source pixels)): Keys' cubic with a = -1/2, widened when reducing."""
    scale = num_source / num_target
    support = 2.0 * max(scale, 1.0)
    centre = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale
    first = max(0, int(centre[0] - support + 0.5))
    last = min(num_source, int(centre[-1] + support + 0.5))
    source = torch.arange(first, last, dtype=torch.float64) + 0.5
    weights = _cubic((source[None, :] - centre[:, None]) / max(scale, 1.0))
    # As PyTorch and Pillow do it, a pixel's support is cut to whole source pixels.
    low = (centre - support + 0.5).long().clamp(min=0)[:, None] + 0.5
    high = (centre + support + 0.5).long().clamp(max=num_source)[:, None] + 0.5
    weights = torch.where((source >= low) & (source < high), weights, 0.0)
    return first, weights / weights.sum(1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
