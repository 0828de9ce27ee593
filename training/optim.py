"""Optimizer, learning-rate schedule and what is drawn once a step: pure functions of the settings and the step."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import torch
from torch import nn

from training.config import StageConfig


def make_optimizer(module: nn.Module, config: StageConfig, device: torch.device) -> torch.optim.AdamW:
    """torch's Adam with decoupled weight decay over the trainable parameters, one pass over memory (fused): on a
    CPU some five times faster than one operation at a time."""
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=is_fused(device),
    )


def is_fused(device: torch.device) -> bool:
    """Whether torch has its optimizers in one pass over memory there."""
    return device.type in ("cuda", "cpu")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(step: int, config: StageConfig) -> float:
    """Learning rate of optimizer step `step` (1, 2, ..., config.steps)."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a key such as (seed, "crop", step): sizes and windows, the same on every worker. What
    is drawn for each sample comes from `training.noise`, and belongs to a place in the run likewise.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def prolonged(config: StageConfig, step: int, before: int) -> str:
    """What it means for a run at `step` that it has another number of steps than `before`, in words; "" where it means
    nothing. A cosine goes on along the curve of the new number: the learning rate rises once, to where that curve is.
    """
    if config.steps == before or step >= config.steps:
        return ""
    words = f"{config.steps} steps in place of {before}"
    if config.schedule == "cosine":
        old = dataclasses.replace(config, steps=before)
        words += (
            f"; the learning rate goes on along the longer cosine: {lr_at(step, old):.3g} at step {step}, "
            f"{lr_at(step + 1, config):.3g} at the next"
        )
    return words
