"""Copies of nested state on the CPU, into memory that is used again: what a checkpoint stops training for.

Fresh memory costs several times the copy itself (each page is cleared and mapped first), so the second and later
snapshots of a run write over the first one's tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class CpuCopies:
    """`take` gives a deep copy in which every tensor is a compact CPU copy, valid until the next `take`."""

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def take(self, value: Any) -> Any:
        """A copy of dictionaries, lists, tuples and tensors; other objects are copied one level deep."""
        return self._copy(value, ())

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, place)
        if isinstance(value, Mapping):
            copied = {key: self._copy(item, (*place, key)) for key, item in value.items()}
            return copied if type(value) is dict else _same_mapping(value, copied)
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, (*place, i)) for i, item in enumerate(value))
        return copy.copy(value) if hasattr(value, "__dict__") and not callable(value) else value

    def _tensor(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        held = self._held.get(place)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            self._held[place] = held
        held.copy_(tensor.detach())
        return held


def _same_mapping(original: Mapping[Any, Any], copied: dict[Any, Any]) -> Any:
    """Ordered dictionaries keep their class, which readers of such files expect."""
    try:
        return type(original)(copied)  # type: ignore[call-arg]
    except TypeError:
        return copied
