"""Snapshots of nested state: copies on the CPU, into memory that is used again. A checkpoint is written from them.

Fresh memory costs several times the copy itself (each page is cleared and mapped first), so the second and later
snapshots of a run write over the first one's tensors.

Weights, moments and averages change in the optimizer's step only. So the copy too is made in the background, during the
forward and backward pass that follow; only the next optimizer step waits for it, should it still be going on.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, cuda


class CpuCopies:
    """`take` gives a deep copy in which every tensor is a compact CPU copy, valid until the next `take`. A copy has its
    tensor's order in memory (rows first or channels last), since copying straight through is several times faster."""

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
            held = self._held[place] = _empty_on_cpu(tensor)
        held.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        return held


class Snapshot:
    """State that is being copied. The thread that writes it calls `files`, the one that trains calls `wait` before it
    changes the state."""

    def __init__(self, state: dict[str, Any], copies: CpuCopies) -> None:
        """`state`: file name → content, whose tensors stay as they are until `wait` has returned."""
        self._state, self._copies = state, copies
        self._copied = threading.Event()
        # On CUDA the copy has a stream of its own, which begins once the work queued so far is done. All of it belongs
        # to the tensors' device, which is not the one that a new thread begins with but on a machine's first worker.
        self._device = _cuda_device(state)
        if self._device is not None:
            self._ready = cuda.current_stream(self._device).record_event()

    def files(self) -> dict[str, Any]:
        """The copy, valid until the next snapshot's `files`. To be called once, in any thread."""
        try:
            if self._device is None:
                return self._copies.take(self._state)
            with cuda.device(self._device):
                stream = cuda.Stream(self._device)
                with cuda.stream(stream):
                    stream.wait_event(self._ready)
                    taken = self._copies.take(self._state)
                stream.synchronize()
            return taken
        finally:
            self._state = {}
            self._copied.set()

    def wait(self) -> float:
        """Until the state may change → seconds that took."""
        started = time.perf_counter()
        self._copied.wait()
        return time.perf_counter() - started


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def _cuda_device(state: Any) -> torch.device | None:
    """The CUDA device of the state's tensors; a worker has one."""
    devices = {tensor.device for tensor in tensors_of(state) if tensor.is_cuda}
    assert len(devices) <= 1, f"one worker's state is on {devices}"
    return devices.pop() if devices else None


def _empty_on_cpu(tensor: Tensor) -> Tensor:
    """Memory for a copy; page-locked for what is copied from a CUDA device, which does not wait for it then."""
    return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda)


def _same_mapping(original: Mapping[Any, Any], copied: dict[Any, Any]) -> Any:
    """Ordered dictionaries keep their class, which readers of such files expect."""
    try:
        return type(original)(copied)  # type: ignore[call-arg]
    except TypeError:
        return copied
