"""Averaged weights in float32, held in the same pieces as the optimizer's master weights.

A `Fragment` is the contiguous part of one parameter that this worker owns: under ZeRO 1-3 a slice, otherwise all of
it. Averaging each fragment where it lives costs no communication; a parameter is put together only to be saved whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Elements of parameter `name` from number `start` on; it has `shape` in full. `tensor` is float32 and flat, or has
    that shape where it is all of the parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor

    @property
    def numel(self) -> int:
        return int(self.tensor.numel())


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """Decay of optimizer step `step` (1, 2, ...). Warm-up lets early averages forget the random start."""
    return min(decay, (1.0 + step) / (10.0 + step)) if warmup else decay


class Ema:
    """avg ← decay · avg + (1 - decay) · weight, one tensor a fragment. It starts as a copy of the weights."""

    def __init__(self, fragments: list[Fragment]) -> None:
        self.averages = [fragment.tensor.detach().to(torch.float32, copy=True) for fragment in fragments]

    @torch.no_grad()
    def update(self, fragments: list[Fragment], decay: float) -> None:
        """One step towards the weights in `fragments`, which have the order they were given in at first."""
        weights = [fragment.tensor for fragment in fragments]
        if self.averages:
            torch._foreach_lerp_(self.averages, weights, 1.0 - decay)

    def fragments(self, like: list[Fragment]) -> list[Fragment]:
        """The averages, named and placed as `like`."""
        return [Fragment(f.name, f.shape, f.start, average) for f, average in zip(like, self.averages)]

    @torch.no_grad()
    def load(self, fragments: list[Fragment], full: Mapping[str, Tensor]) -> None:
        """Take this worker's part of whole averaged parameters, flat or shaped. Every name must be there."""
        for fragment, average in zip(fragments, self.averages):
            whole = full[fragment.name].flatten()
            average.copy_(whole[fragment.start : fragment.start + fragment.numel].view(average.shape))


def to_tensors(fragments: list[Fragment]) -> dict[str, Tensor]:
    """Fragments under keys "start:name", to be written to a safetensors file."""
    return {f"{f.start}:{f.name}": f.tensor.detach() for f in fragments if f.numel}


def assemble(parts: list[dict[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Whole parameters from the workers' fragments (`to_tensors`), however many workers there were.

    Raises KeyError or ValueError when a parameter of `shapes` is not covered.
    """
    pieces: dict[str, dict[int, Tensor]] = {}
    for part in parts:
        for key, tensor in part.items():
            start, _, name = key.partition(":")
            pieces.setdefault(name, {})[int(start)] = tensor
    full: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        numel, position, row = int(torch.Size(shape).numel()), 0, []
        for first, tensor in sorted(pieces[name].items()):
            if first != position:
                raise ValueError(f"averaged weights of {name} have a gap at element {position}")
            row.append(tensor.flatten())
            position += tensor.numel()
        if position != numel:
            raise ValueError(f"averaged weights of {name} hold {position} of {numel} elements")
        full[name] = torch.cat(row).reshape(shape)
    return full
