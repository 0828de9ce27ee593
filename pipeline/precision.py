"""Where autocast is left: parts that must stay exact, or whose work is too small to gain from half precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a device type."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A region in which autocast, if it is on, is off."""
    return torch.autocast(device, enabled=False) if is_autocast(device) else contextlib.nullcontext()


def keep_norms_exact(module: torch.nn.Module) -> None:
    """In place: group norms of `module` compute and return float32 under autocast. CUDA's autocast has them so; a CPU's
    would round what they return."""
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.register_forward_pre_hook(_exact_input)


def _exact_input(norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.float() if is_autocast(tensor.device.type) else tensor for tensor in inputs)
