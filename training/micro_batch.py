"""A part of a batch on the training device: what a loss is computed of at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from preprocess.shards.sample import Batch
from training.noise import Draws


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a batch on the training device. `index`: their places in the global batch.

    pixels (B,3,H,W) float in [-1,1]; latents and condition (B,S,h,w) stored, unscaled.
    """

    index: range
    pixels: Tensor | None
    latents: Tensor | None
    condition: Tensor | None

    def draws(self, *key: int | str) -> Draws:
        """Random numbers of these samples on their device, the same ones whatever worker holds them."""
        device = next(t.device for t in (self.latents, self.pixels, self.condition) if t is not None)
        return Draws(self.index, device, *key)


def placed(batch: Batch, part: slice, first: int, device: torch.device) -> MicroBatch:
    """Samples `part` of a batch on the device; the first of them is number `first` of all."""
    return MicroBatch(
        range(first, first + part.stop - part.start),
        _pixels(batch.pixels, part, device),
        _place(batch.latents, part, device),
        _place(batch.condition, part, device),
    )


def _pixels(pixels: Tensor | None, part: slice, device: torch.device) -> Tensor | None:
    if pixels is None:
        return None
    return _moved(pixels[part], device).float().div_(127.5).sub_(1.0)


def _place(tensor: Tensor | None, part: slice, device: torch.device) -> Tensor | None:
    return None if tensor is None else _moved(tensor[part], device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from page-locked memory, since a copy from other memory waits for the work before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
