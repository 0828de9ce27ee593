"""A stage's precision: the types of its settings, and where they hold. Losses are float32 everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.config import StageConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: StageConfig, device: torch.device) -> torch.autocast:
    """The stage's precision for a frozen network outside the engine."""
    return autocast_to(DTYPES[config.precision], device)


def frozen_dtype(config: StageConfig, device: torch.device) -> torch.dtype:
    """Of a frozen decoder that a gradient passes: on CUDA the stage's precision, in which the fused head computes its
    gradient too; on a CPU float32."""
    return DTYPES[config.precision] if device.type == "cuda" else torch.float32


def frozen_precision(config: StageConfig, device: torch.device) -> torch.autocast:
    """`frozen_dtype` as a context."""
    return autocast_to(frozen_dtype(config, device), device)


def autocast_to(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A region whose operations compute in `dtype`; for float32 one that changes nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of a value or tuple of values in another type; whole numbers stay."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
        return tuple(cast(item, dtype) for item in value)
    return value
