"""What a stage's loop trains its network with: `Engine`. `make_engine` picks DeepSpeed (`training.engine_deepspeed`),
distributed data parallel (`training.engine_ddp`) or one process (`training.engine_local`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.precision import keep_norms_exact
from training.config import StageConfig
from training.engine_ddp import DdpEngine
from training.engine_deepspeed import DeepSpeedEngine
from training.engine_local import LocalEngine
from training.power_ema import PowerAverages
from training.snapshots import Snapshot
from training.tuning import compile_where_it_pays
from training.world import World


class Engine(Protocol):
    """One network being trained."""

    name: str
    module: nn.Module
    world: World
    power: PowerAverages
    stall: float
    """Seconds that optimizer steps waited for a snapshot to be copied."""

    def __call__(self, *inputs: Any) -> Any:
        """The network's forward pass, in the stage's precision."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch, whose mean loss this is."""

    def step(self, step: int, lr: float) -> Tensor:
        """Apply optimizer step `step` (1, 2, ...) and average the weights → global gradient norm, where it is: reading
        it waits for the device. Where it is not finite, the weights stay."""

    def snapshot(self) -> Snapshot:
        """This worker's part of a checkpoint. The next `step` waits until its `files` has been called. Collective."""

    def load(self, folder: Path, saved_world_size: int) -> None:
        """Continue from a checkpoint's files in a local folder. Collective."""

    def averaged(self) -> dict[str, Tensor] | None:
        """Whole averaged weights by name on the main worker, None on the others. Collective."""

    def average_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors on the device, one for each trained parameter's name, with the averaged weights, on every
        worker. Collective."""

    def power_averages(self) -> dict[float, dict[str, Tensor]] | None:
        """Length → whole power-function average by name (`training.power_ema`) on the main worker, None on the others.
        Collective."""


def make_engine(module: nn.Module, config: StageConfig, world: World, *, deepspeed: bool) -> Engine:
    """The engine for `module`, whose parameters that require a gradient are trained: DeepSpeed's, else distributed
    data parallel where there are several workers."""
    accumulation = accumulation_steps(config, world.size)
    if config.precision == "fp16" and world.device.type == "cpu":
        raise UserError("precision fp16 needs a CUDA device; use bf16 or fp32 on a CPU")
    if config.channels_last and not deepspeed:  # DeepSpeed flattens weights, so there only what flows is channels-last
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.activation_checkpointing:
        enable_activation_checkpointing(module)
    is_split = deepspeed and config.zero_stage == 3  # which has hooks of its own on every module
    if config.precision == "bf16" and world.device.type == "cpu" and not is_split:
        keep_norms_exact(module)
    compile_where_it_pays(module, config, world.device)
    if deepspeed:
        return DeepSpeedEngine(module, config, world, accumulation)
    if config.zero_stage > 1 and world.size > 1:
        raise UserError(
            f"zero_stage = {config.zero_stage} splits gradients or weights over the workers, which needs the engine "
            "deepspeed; with ddp use zero_stage 0 or 1"
        )
    return (DdpEngine if world.size > 1 else LocalEngine)(module, config, world, accumulation)


def accumulation_steps(config: StageConfig, num_workers: int) -> int:
    """Micro-batches per optimizer step; `UserError` when the workers cannot share the global batch evenly."""
    if config.global_batch % num_workers:
        raise UserError(
            f"global_batch = {config.global_batch} cannot be shared by {num_workers} workers; "
            f"use a multiple of {num_workers} or another number of workers"
        )
    share = config.global_batch // num_workers
    micro = config.micro_batch or share
    if share % micro:
        raise UserError(
            f"micro_batch = {micro} does not divide a worker's share of {share} samples "
            f"(global_batch {config.global_batch} over {num_workers} workers)"
        )
    return share // micro


def enable_activation_checkpointing(module: nn.Module) -> None:
    """Have every block that can recompute its activations do so in the backward pass (less memory, more time)."""

    def recompute(block: nn.Module, *inputs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(block.__call__, *inputs, use_reentrant=False)

    for part in module.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = True  # type: ignore[assignment]
            part._gradient_checkpointing_func = recompute  # type: ignore[assignment]
