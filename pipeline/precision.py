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
