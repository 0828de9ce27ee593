"""What a stage will need, before it runs: parameters, memory of one worker, floating-point operations, time.

The networks are built on the "meta" device, which has shapes but no numbers; one forward pass there tells which
activations the backward pass keeps and how many multiplications it takes. Kernels' own workspaces are not counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bundle import build_autoencoder, build_decoder, build_denoiser
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.progress import format_seconds
from training.config import AlignStage, AutoencoderStage, DecoderStage, DistillStage, Preset, StageConfig, is_joint
from training.engine import accumulation_steps, enable_activation_checkpointing
from training.reconstruction import Reconstruction, joint_first_stage
from training.targets import largest_target, render_target
from training.zoom import largest_zoom

_PEAK_TFLOPS = {
    # dense, without sparsity: (bf16 or fp16, fp32)
    "H200": (989.0, 67.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
_BACKWARD = 3.0
"""Forward and backward together cost about three forwards."""


@dataclass(frozen=True)
class Estimate:
    """bytes are for one worker; flops are of one optimizer step over all workers."""

    parameters: int
    frozen_parameters: int
    state_bytes: int
    activation_bytes: int
    flops_per_step: float

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def estimate(stage: str, config: StageConfig, model: ModelConfig, num_workers: int) -> Estimate:
    """Size up one stage. `UserError` when the workers cannot share the global batch."""
    accumulation = accumulation_steps(config, num_workers)
    micro = config.global_batch // num_workers // accumulation
    with torch.device("meta"):
        trained, frozen, forward = _case(stage, config, model, micro)
    if config.activation_checkpointing:
        enable_activation_checkpointing(trained)
    num = sum(p.numel() for p in trained.parameters())
    num_frozen = sum(p.numel() for p in frozen.parameters()) if frozen is not None else 0
    saved = _SavedBytes()
    counter = FlopCounterMode(display=False)
    with counter, _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        forward()
    half = 2 if config.precision != "fp32" else 4
    activations = saved.total * half // 4
    flops = _BACKWARD * counter.get_total_flops() * config.global_batch / micro
    if isinstance(config, DistillStage):
        num_frozen += num  # the teacher
        flops += _teacher_flops(config, model) * config.global_batch
    state = _state_bytes(num, config, num_workers) + 4 * num_frozen
    return Estimate(num, num_frozen, state, activations, flops)


def _state_bytes(num: int, config: StageConfig, num_workers: int) -> int:
    """Weights, gradients, float32 masters, two Adam moments and averages, each split as its ZeRO stage says. "bf16" is
    autocast: only "fp16" halves weights and gradients. ZeRO 3 of float32 weights needs no masters."""
    width = 2 if config.precision == "fp16" else 4
    split = num_workers
    weights = num * width // (split if config.zero_stage >= 3 else 1)
    gradients = num * width // (split if config.zero_stage >= 2 else 1)
    masters = 4 if config.precision == "fp16" or config.zero_stage in (1, 2) else 0
    optimizer = num * (masters + 8 + 4) // (split if config.zero_stage >= 1 else 1)
    return weights + gradients + optimizer


def _teacher_flops(config: DistillStage, model: ModelConfig) -> float:
    """Of the teacher's trajectory for one sample, and the rendering of where it ends: forward only."""
    with torch.device("meta"), torch.no_grad():
        _, decoder, _ = _case("distill", config, model, 1)
        latent = torch.empty(1, model.autoencoder.latent_channels, model.latent_size, model.latent_size)
        denoiser, t = build_denoiser(model), torch.empty(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as drawing, _FusedAttention():
            denoiser(latent, t, latent if model.task == "sr" else None)
        with FlopCounterMode(display=False) as rendering, _FusedAttention():
            render_target(decoder, latent, largest_target(config, model), config.context_cells)  # type: ignore[arg-type]
    return config.teacher_steps * drawing.get_total_flops() + rendering.get_total_flops()


class _SavedBytes:
    """Adds up the tensors that autograd keeps, each storage once, weights left out."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[int, torch.UntypedStorage] = {}  # kept alive, or another could have its key

    def pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            self.add(tensor)
        return tensor

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Attention as CPUs and CUDA devices run it, in one kernel: on the "meta" device torch would take the plain path,
    which keeps a matrix of all pairs of cells."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def _case(
    stage: str, config: StageConfig, model: ModelConfig, micro: int
) -> tuple[nn.Module, nn.Module | None, Callable[[], object]]:
    """The trained network, the frozen one, and a forward pass of one micro-batch. Called on the meta device."""
    channels, cells = model.autoencoder.latent_channels, model.latent_size
    latent = torch.empty(micro, channels, cells, cells)
    if isinstance(config, AutoencoderStage) and is_joint(config):
        first = joint_first_stage(model)
        size, window = (target := largest_target(config, model)).size, target.window
        image = torch.empty(micro, 3, model.image_size, model.image_size)
        return first, None, lambda: first(image, latent, size, window)
    if isinstance(config, AutoencoderStage):
        side = config.crop or model.image_size
        network = Reconstruction(build_autoencoder(model))
        factor = model.autoencoder.factor
        noise = torch.empty(micro, channels, side // factor, side // factor)
        return network, None, lambda: network(torch.empty(micro, 3, side, side, device="meta"), noise)
    if isinstance(config, DecoderStage):
        decoder = build_decoder(model)
        if model.task == "direct":
            cells, side, compared = largest_zoom(config, model.image_size)
            low, window = torch.empty(micro, channels, cells, cells), (0, 0, compared, compared)
            return decoder, None, lambda: decoder(low, (side, side), window)
        target = largest_target(config, model)
        return decoder, None, lambda: decoder(latent, target.size, target.window)
    denoiser = build_denoiser(model)
    t = torch.empty(micro, dtype=torch.int64)
    condition = latent if model.task == "sr" else None
    if not isinstance(config, (AlignStage, DistillStage)):
        return denoiser, None, lambda: denoiser(latent, t, condition)
    frozen = build_decoder(model).requires_grad_(False)
    target = largest_target(config, model)
    scale, context = model.scale_factor, config.context_cells
    return denoiser, frozen, lambda: render_target(frozen, denoiser(latent, t, condition) / scale, target, context)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in floating-point operations a second, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, (half, full) in _PEAK_TFLOPS.items():
        if re.search(rf"\b{known}\b", name):  # an "RTX A1000" is no A100, an "L40" no L4
            return 1e12 * (full if precision == "fp32" else half)
    return None


def check_memory(stage: str, config: StageConfig, model: ModelConfig, num_workers: int, device: torch.device) -> None:
    """`UserError` when a CUDA device is smaller than the estimate."""
    if device.type != "cuda":
        return
    needed, there = estimate(stage, config, model, num_workers).total_bytes, torch.cuda.mem_get_info(device)[1]
    if needed > there:
        raise UserError(
            f"{stage} needs about {_size(needed)} on each GPU and this one has {_size(there)}; lower micro_batch, "
            "raise zero_stage, or set activation_checkpointing"
        )


def dry_run(stage: str, preset: Preset, num_workers: int, device: str | None = None) -> str:
    """A table for people."""
    config = preset.stage(stage)
    result = estimate(stage, config, preset.model, num_workers)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    speed = (peak_flops(place, config.precision) or 0.0) * 0.3 or _measured_speed(place, config.precision)
    seconds = config.steps * result.flops_per_step / (speed * num_workers)
    rows = [
        ("stage", f"{stage} of preset {preset.name}"),
        ("trained parameters", f"{result.parameters:,}"),
        ("frozen parameters", f"{result.frozen_parameters:,}"),
        ("workers", f"{num_workers} on {place.type}, ZeRO {config.zero_stage}, {config.precision}"),
        ("global batch", f"{config.global_batch}, {config.micro_batch or config.global_batch // num_workers} at once"),
        (
            "memory of a worker",
            f"{_size(result.total_bytes)}: state {_size(result.state_bytes)}, "
            f"activations about {_size(result.activation_bytes)}",
        ),
        ("steps", f"{config.steps:,}"),
        ("work of a step", f"{result.flops_per_step / 1e9:,.1f} GFLOP"),
        ("time", f"about {format_seconds(seconds)} at {speed / 1e9:,.0f} GFLOP/s a worker"),
    ]
    return "\n".join(f"{name:20} {value}" for name, value in rows)


def _measured_speed(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a short matrix product, at half of which convolutions usually run."""
    size = 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    a @ a
    start = time.perf_counter()
    num = 0
    while time.perf_counter() - start < 0.3:
        a @ a
        num += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0.5 * num * 2.0 * size**3 / (time.perf_counter() - start)


def _size(num: int) -> str:
    return f"{num / 2**30:.2f} GiB" if num >= 2**30 else f"{num / 2**20:.1f} MiB"
