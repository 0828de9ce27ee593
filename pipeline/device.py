"""Devices by name."""

from __future__ import annotations

import torch

from pipeline.errors import UserError, first_line


def checked_device(device: torch.device | str) -> torch.device:
    """The device, if this machine has it; `UserError` otherwise."""
    try:
        found = torch.empty(0, device=device).device
        is_real, reason = found.type != "meta", "it holds no numbers"
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # what PyTorch raises depends on its build
        is_real, reason = False, first_line(error).split(". ")[0]
    if not is_real:
        raise UserError(f"device {str(device)!r} is not there ({reason}); use cpu, cuda, or cuda:1")
    asked = torch.device(device)
    if asked.type == "cpu" and asked.index:  # which PyTorch takes for the one there is
        raise UserError(f"device {str(device)!r} is not there (there is one CPU device); use cpu")
    return asked
