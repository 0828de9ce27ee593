"""Pairs for direct super-resolution, drawn anew for every step: a scale, a region, which pixels of it are compared.

Legend: B batch, H/W pixels of the region, c cells (low-resolution pixels) a side, s scale = region side / c.
Everything is drawn once a step and is the same on every worker, so that a batch is one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.geometry import Size
from pipeline.images import from_uint8, rounded
from pipeline.resize import enlarge, resize
from training.config import DecoderStage
from training.optim import generator_for


@dataclass(frozen=True)
class Zoom:
    """A region of `size` (H, W) pixels, as it is held, reduced to `cells` × `cells`. In the image it begins at (top,
    left), with height and width exchanged where it is `turned`. `rows`, `cols`: the pixels of the region that are
    rendered and compared, ascending. `upside_down` and `turned`: with the loader's mirrored samples, the eight ways to
    hold a picture."""

    cells: int
    size: Size
    top: int
    left: int
    rows: Tensor
    cols: Tensor
    upside_down: bool
    turned: bool

    def region(self, image: Tensor) -> Tensor:
        """image (B,3,·,·) → the region (B,3,*size)."""
        height, width = self.size[::-1] if self.turned else self.size
        part = image[:, :, self.top : self.top + height, self.left : self.left + width]
        part = part.flip(-2) if self.upside_down else part
        return part.transpose(-1, -2).contiguous() if self.turned else part.contiguous()

    def truth(self, region: Tensor) -> Tensor:
        """The region's pixels that are compared, (B,3,len(rows),len(cols))."""
        rows, cols = (index.to(region.device, non_blocking=True) for index in (self.rows, self.cols))
        return region[:, :, rows[:, None], cols[None, :]]

    def low_resolution(self, region: Tensor) -> Tensor:
        """The region reduced to (B,3,cells,cells): anti-aliased bicubic, 8 bits, as people's small pictures are."""
        return from_uint8(rounded(resize(region, (self.cells, self.cells))))


def draw_zoom(config: DecoderStage, image_size: int, step: int) -> Zoom:
    """A scale, log-uniform in [min_scale, max_scale], and a region that `input_cells` cells (fewer where the image is
    too small for them) cover at that scale. With max_aspect > 1 the two axes have scales of their own in that range,
    whose ratio is log-uniform in [1/max_aspect, max_aspect] as far as the range allows."""
    generator = generator_for(config.seed, "zoom", step)
    low, high = math.log(config.min_scale), math.log(config.max_scale)
    log_scale = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    log_scales = log_scale, log_scale
    if config.max_aspect > 1:
        most = math.log(config.max_aspect)
        ends = max(low, log_scale - most), min(high, log_scale + most)
        other = ends[0] + (ends[1] - ends[0]) * float(torch.rand((), generator=generator, dtype=torch.float64))
        is_wide = bool(torch.randint(0, 2, (), generator=generator))
        log_scales = (log_scale, other) if is_wide else (other, log_scale)
    scales = math.exp(log_scales[0]), math.exp(log_scales[1])
    cells = max(1, min(config.input_cells, int(image_size / max(scales))))
    height, width = (min(image_size, max(cells, round(cells * scale))) for scale in scales)
    places = [int(torch.randint(0, image_size - side + 1, (), generator=generator)) for side in (height, width)]
    rows, cols = (_compared(config, side, generator) for side in (height, width))
    upside_down, turned = (bool(torch.randint(0, 2, (), generator=generator)) and config.turns for _ in range(2))
    top, left = places[::-1] if turned and height != width else places
    return Zoom(cells, (height, width), top, left, rows, cols, upside_down, turned)


def largest_zoom(config: DecoderStage, image_size: int) -> tuple[int, int, int]:
    """(cells, side, compared pixels a side) of the costliest draw, for estimates."""
    cells = max(1, min(config.input_cells, int(image_size / config.min_scale)))
    side = min(image_size, max(cells, round(cells * config.max_scale)))
    return cells, side, min(config.crop or side, side)


def smallest_zoom(config: DecoderStage, image_size: int) -> int:
    """Compared pixels a side of the smallest draw, or a pixel or two less."""
    longest = max(1, image_size - math.ceil(config.max_scale))
    side = min(int(config.input_cells * config.min_scale), max(1, int(longest / config.max_aspect)))
    return min(config.crop or side, side)


def _compared(config: DecoderStage, side: int, generator: torch.Generator) -> Tensor:
    """Pixels along one axis: all, a window of `crop`, or `crop` of them scattered over the region (then every cell has
    a say at every scale, as in LIIF, whose samples are scattered too)."""
    if not config.crop or config.crop >= side:
        return torch.arange(side)
    if config.scattered:
        return torch.randperm(side, generator=generator)[: config.crop].sort().values
    start = int(torch.randint(0, side - config.crop + 1, (), generator=generator))
    return torch.arange(start, start + config.crop)


def condition_image(low: Tensor, factor: int, mode: str) -> Tensor:
    """A low-resolution image (B,3,c,c) enlarged by the autoencoder's factor, so that a cell is a pixel of it."""
    return low if factor == 1 else enlarge(low, (low.shape[-2] * factor, low.shape[-1] * factor), mode)
