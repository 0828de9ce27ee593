"""Target sizes and windows of the alignment stages. Drawn once a step, the same on every worker.

Height and width differ where the stage's max_aspect allows it: then the decoder meets pixels that are not square, of
which a picture stretched to another shape is made. Both sides stay in the range of sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from pipeline.resize import resize
from training.config import AlignStage, AutoencoderStage, DecoderStage, DistillStage
from training.optim import generator_for


@dataclass(frozen=True)
class Target:
    """An output of `size` pixels, of which the window (y0, x0, y1, x1) is rendered and compared."""

    size: tuple[int, int]
    window: tuple[int, int, int, int]

    def truth(self, image: Tensor) -> Tensor:
        """What is compared with: image (B,3,H,W) resized with anti-aliasing, then the window → (B,3,y1-y0,x1-x0)."""
        y0, x0, y1, x1 = self.window
        return resize(image, self.size)[:, :, y0:y1, x0:x1]


def render_target(decoder: ImplicitDecoder, latent: Tensor, target: Target, context_cells: int = 0) -> Tensor:
    """The target's window of ND(latent; size): unscaled latent (B,C,h,w) → (B,3,y1-y0,x1-x0), with gradient.

    context_cells > 0: D_phi sees only the cells under the window and that many around them. Geometry stays exact; what
    D_phi would have taken from further away is missing.
    """
    if context_cells <= 0:
        return decoder(latent, target.size, target.window)
    h, w = latent.shape[-2:]
    y0, x0, y1, x1 = target.window
    top, bottom = _cells(y0, y1, target.size[0], h, context_cells)
    left, right = _cells(x0, x1, target.size[1], w, context_cells)
    features = decoder.features(latent[:, :, top:bottom, left:right])
    features = F.pad(features, (left, w - right, top, h - bottom))
    return decoder.render(features, target.size, target.window)


def _cells(start: int, stop: int, num_pixels: int, num_cells: int, context: int) -> tuple[int, int]:
    """Cells under the pixels start..stop-1, their neighbours that the ensemble reads, and `context` more."""
    first = start * num_cells // num_pixels - 1 - context
    last = -(-stop * num_cells // num_pixels) + 1 + context
    return max(0, first), min(num_cells, last)


Stage = AutoencoderStage | DecoderStage | AlignStage | DistillStage
"""Stages that render targets; stage 0 does with the implicit decoder."""


def size_range(config: Stage, model: ModelConfig, smallest: int = 0) -> tuple[int, int]:
    """Smallest and largest target side, both included; by default the latent's (or `smallest`) and the image's own."""
    low, high = config.min_size or smallest or model.latent_size, config.max_size or model.image_size
    if not 1 <= low <= high:
        raise UserError(f"target sizes {low}..{high} are empty; give min_size <= max_size")
    return low, high


def window_side(config: Stage, model: ModelConfig, side: int) -> int:
    """Side of the window of a target of `side` pixels: the smallest of the target, `crop` and `crop_cells` cells."""
    bounds = [side]
    if config.crop:
        bounds.append(config.crop)
    if isinstance(config, (AlignStage, DistillStage)) and config.crop_cells:
        bounds.append(max(1, config.crop_cells * side // model.latent_size))
    return min(bounds)


def largest_target(config: Stage, model: ModelConfig) -> Target:
    """The costliest target of a stage: the largest size, a window in its middle."""
    side = size_range(config, model)[1]
    window = window_side(config, model, side)
    start = (side - window) // 2
    return Target((side, side), (start, start, start + window, start + window))


def draw_target(config: Stage, model: ModelConfig, step: int, smallest: int = 0) -> Target:
    """A side uniform in the range; the other one is it times a ratio, log-uniform in [1/max_aspect, max_aspect] as far
    as that stays in the range; which of them is the height, by chance; a uniformly placed window (`window_side`)."""
    low, high = size_range(config, model, smallest)
    generator = generator_for(config.seed, "target", step)
    side = int(torch.randint(low, high + 1, (), generator=generator))
    height, width = side, side
    if config.max_aspect > 1:
        ends = math.log(max(1 / config.max_aspect, low / side)), math.log(min(config.max_aspect, high / side))
        ratio = math.exp(ends[0] + (ends[1] - ends[0]) * float(torch.rand((), generator=generator)))
        height, width = side, min(max(round(side * ratio), low), high)
        if torch.randint(0, 2, (), generator=generator):
            height, width = width, height
    tall, wide = window_side(config, model, height), window_side(config, model, width)
    y0 = int(torch.randint(0, height - tall + 1, (), generator=generator))
    x0 = int(torch.randint(0, width - wide + 1, (), generator=generator))
    return Target((height, width), (y0, x0, y0 + tall, x0 + wide))
