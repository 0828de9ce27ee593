"""What a stage will need, before it runs: parameters, memory of one worker, floating-point operations, time.

The networks are built on the "meta" device, which has shapes but no numbers; one forward pass there tells which
activations the backward pass keeps and how many multiplications it takes. Kernels' own workspaces are not counted.

More than 350 lines: what one stage costs is one sum, and its terms are read together.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bundle import build_autoencoder, build_decoder, build_denoiser
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.geometry import Size
from pipeline.progress import format_seconds
from training.config import AlignStage, AutoencoderStage, DecoderStage, DistillStage, Preset, StageConfig, is_joint
from training.engine import accumulation_steps, enable_activation_checkpointing
from training.engine_deepspeed import bucket_size
from training.estimate_losses import kept_by_backward, loss_networks
from training.power_ema import LENGTHS
from training.precision import frozen_dtype
from training.reconstruction import Reconstruction, joint_first_stage
from training.targets import draw_target, largest_target, render_target
from training.zoom import draw_zoom, largest_zoom

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


@dataclass(frozen=True)
class Estimate:
    """bytes are for one worker; flops are of one optimizer step over all workers, the mean over the run: those after
    adversarial_start, a share of them, take adversarial_flops more than those before."""

    parameters: int
    frozen_parameters: int
    state_bytes: int
    activation_bytes: int
    flops_per_step: float
    adversarial_flops: float = 0.0
    adversarial_share: float = 0.0
    adversarial_start: int = 0

    def flops_at(self, step: int) -> float:
        """Of optimizer step `step` (1, 2, ...)."""
        return self.flops_per_step + self.adversarial_flops * ((step > self.adversarial_start) - self.adversarial_share)

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def estimate(
    stage: str, config: StageConfig, model: ModelConfig, num_workers: int, device: torch.device | str = "cpu"
) -> Estimate:
    """Size up one stage on such a device. `UserError` when the workers cannot share the global batch."""
    accumulation = accumulation_steps(config, num_workers)
    micro = config.global_batch // num_workers // accumulation
    case = _meta_case(config, model, micro)
    if config.activation_checkpointing:
        enable_activation_checkpointing(case.trained)
    num = sum(p.numel() for p in case.trained.parameters())
    num_behind = num_frozen = sum(p.numel() for p in case.frozen.parameters()) if case.frozen is not None else 0
    with _FusedAttention():
        with kept_by_backward() as saved:
            made = case.forward(case.largest)
        with kept_by_backward() as behind:
            case.through(made, case.largest)
    losses = loss_networks(config, _shape(made))
    num_frozen += losses.frozen_parameters
    # The trained network computes in the stage's precision, the frozen one behind it in its own.
    frozen_bytes = frozen_dtype(config, torch.device(device)).itemsize
    activations = (saved.total * (4 if config.precision == "fp32" else 2) + behind.total * frozen_bytes) // 4
    activations = max(activations + losses.kept_bytes, losses.alone_bytes)
    flops, late_flops = _flops_per_sample(config, model)
    if isinstance(config, DistillStage):
        num_frozen += num  # the teacher
        flops += _teacher_flops(config, model)
    state = _state_bytes(num, config, num_workers) + 4 * num_frozen + losses.state_bytes
    if config.grid_every or config.validate_every or config.quality_every:
        state += 4 * num  # the averaged network of grids and held-out figures
    if config.validate_every:
        state += 4 * num_behind  # their own copy of the frozen decoder
    share = max(0, config.steps - losses.start) / max(1, config.steps)
    return Estimate(
        num,
        num_frozen,
        state,
        activations,
        (flops + share * late_flops) * config.global_batch,
        late_flops * config.global_batch,
        share,
        losses.start,
    )


_DRAWS = 6
"""Steps whose drawn sizes stand for all."""


@functools.lru_cache(maxsize=64)
def _flops_per_sample(config: StageConfig, model: ModelConfig) -> tuple[float, float]:
    """Floating-point operations for one sample of a step, the mean over drawn sizes: forward and twice that backward
    for what is trained; forward and the gradient by the input for what is frozen behind it; forward for what is before
    it; and the networks in the loss. And those that the discriminator adds."""
    case = _meta_case(config, model, 1)
    drawn = [case.draw(step) for step in range(1, _DRAWS + 1)]
    targets = list(dict.fromkeys(drawn))  # one for all steps where nothing is drawn
    total = late = 0.0
    for target in targets:
        with _FusedAttention(), FlopCounterMode(display=False) as forward:
            made = case.forward(target)
        with _FusedAttention(), FlopCounterMode(display=False) as behind:
            case.through(made, target)
        with _FusedAttention(), FlopCounterMode(display=False) as before, torch.no_grad():
            case.before(target)
        losses = loss_networks(config, _shape(made))
        flops = 3.0 * forward.get_total_flops() + 2.0 * behind.get_total_flops() + before.get_total_flops()
        total += (flops + losses.flops) * drawn.count(target)
        late += losses.late_flops * drawn.count(target)
    return total / len(drawn), late / len(drawn)


def _shape(made: Any) -> tuple[int, ...]:
    """Of the pictures that a forward pass makes, first among its results."""
    return tuple((made if isinstance(made, Tensor) else made[0]).shape)


def _state_bytes(num: int, config: StageConfig, num_workers: int) -> int:
    """Weights, gradients, float32 masters, two Adam moments and averages, each split as its ZeRO stage says, and two
    buckets that are filled and reduced in turn. "bf16" is autocast: only "fp16" halves weights and gradients. ZeRO 3 of
    float32 weights needs no masters."""
    width = 2 if config.precision == "fp16" else 4
    split = num_workers
    weights = num * width // (split if config.zero_stage >= 3 else 1)
    gradients = num * width // (split if config.zero_stage >= 2 else 1)
    masters = 4 if config.precision == "fp16" or config.zero_stage in (1, 2) else 0
    powers = 4 * len(LENGTHS) if config.power_ema_every else 0
    optimizer = num * (masters + 8 + 4 + powers) // (split if config.zero_stage >= 1 else 1)
    buckets = 2 * bucket_size(num) * width if config.zero_stage and num_workers > 1 else 0
    return weights + gradients + optimizer + buckets


@functools.lru_cache(maxsize=64)
def _teacher_flops(config: DistillStage, model: ModelConfig) -> float:
    """Of the teacher's trajectory for one sample, and the rendering of where it ends: forward only."""
    case = _meta_case(config, model, 1)
    with torch.no_grad(), _FusedAttention():
        with FlopCounterMode(display=False) as drawing:
            made = case.forward(case.largest)
        with FlopCounterMode(display=False) as rendering:
            case.through(made, case.largest)
    return float(config.teacher_steps * drawing.get_total_flops() + rendering.get_total_flops())


class _FusedAttention(TorchFunctionMode):
    """Attention as CPUs and CUDA devices run it, in one kernel: on the "meta" device torch would take the plain path,
    which keeps a matrix of all pairs of cells."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Case:
    """A stage on the meta device: the trained network and the frozen one behind or before it, a forward pass of a
    micro-batch through each (`through` what `forward` made; `before` without gradient), the costliest target and the
    one that a step draws."""

    trained: nn.Module
    frozen: nn.Module | None
    forward: Callable[[Any], Any]
    through: Callable[[Any, Any], object]
    largest: Any
    draw: Callable[[int], Any]
    before: Callable[[Any], object] = lambda target: None


def _meta_case(config: StageConfig, model: ModelConfig, micro: int) -> _Case:
    with torch.device("meta"):
        return _case(config, model, micro)


def _case(config: StageConfig, model: ModelConfig, micro: int) -> _Case:
    channels, cells = model.autoencoder.latent_channels, model.latent_size
    latent = torch.empty(micro, channels, cells, cells)

    def alone(trained: nn.Module, forward: Callable[[Any], Any], largest: Any = None, draw: Any = None) -> _Case:
        return _Case(trained, None, forward, lambda made, target: None, largest, draw or (lambda step: largest))

    if isinstance(config, AutoencoderStage) and is_joint(config):
        first = joint_first_stage(model)
        image = torch.empty(micro, 3, model.image_size, model.image_size)
        return alone(
            first,
            lambda target: first(image, latent, target.size, target.window),
            largest_target(config, model),
            partial(draw_target, config, model),
        )
    if isinstance(config, AutoencoderStage):
        side = config.crop or model.image_size
        network = Reconstruction(build_autoencoder(model))
        factor = model.autoencoder.factor
        noise = torch.empty(micro, channels, side // factor, side // factor)
        return alone(network, lambda _: network(torch.empty(micro, 3, side, side, device="meta"), noise))
    if isinstance(config, DecoderStage):
        decoder = build_decoder(model)
        if model.task == "direct":

            def enlarge(target: tuple[int, Size, Size]) -> Tensor:
                cells, size, (height, width) = target
                low = torch.empty(micro, channels, cells, cells, device="meta")
                return decoder(low, size, (0, 0, height, width))

            cells, side, compared = largest_zoom(config, model.image_size)
            largest = cells, (side, side), (compared, compared)
            case = alone(decoder, enlarge, largest, partial(_drawn_zoom, config, model.image_size))
            if config.conditions != "drawn" or model.autoencoder.kind == "identity":
                return case
            encoder = build_autoencoder(model).requires_grad_(False)

            def encode(target: tuple[int, Size, Size]) -> Tensor:
                side = target[0] * model.autoencoder.factor
                return encoder.encode(torch.empty(micro, 3, side, side, device="meta"))

            return dataclasses.replace(case, frozen=encoder, before=encode)
        return alone(
            decoder,
            lambda target: decoder(latent, target.size, target.window),
            largest_target(config, model),
            partial(draw_target, config, model),
        )
    denoiser = build_denoiser(model)
    t = torch.empty(micro, dtype=torch.int64)
    condition = latent if model.task == "sr" else None
    if not isinstance(config, (AlignStage, DistillStage)):
        return alone(denoiser, lambda _: denoiser(latent, t, condition))
    frozen = build_decoder(model).requires_grad_(False)
    return _Case(
        denoiser,
        frozen,
        lambda _: denoiser(latent, t, condition) / model.scale_factor,
        lambda made, target: render_target(frozen, made, target, config.context_cells),
        largest_target(config, model),
        partial(draw_target, config, model),
    )


def _drawn_zoom(config: DecoderStage, image_size: int, step: int) -> tuple[int, Size, Size]:
    zoom = draw_zoom(config, image_size, step)
    return zoom.cells, zoom.size, (len(zoom.rows), len(zoom.cols))


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
    """`UserError` when a CUDA device has less free memory than the estimate."""
    if device.type != "cuda":
        return
    needed = estimate(stage, config, model, num_workers, device).total_bytes
    free, whole = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # by this process, for itself
    if needed > free:
        raise UserError(
            f"{stage} needs about {_size(needed)} on each GPU and this one has {_size(free)} free of {_size(whole)}; "
            "lower micro_batch, raise zero_stage, set activation_checkpointing, or stop what else runs there"
        )


@dataclass(frozen=True)
class Need:
    """What a stage needs: rows for people, facts for programs (bytes, seconds, floating-point operations)."""

    rows: tuple[tuple[str, str], ...]
    facts: dict[str, Any]

    def text(self) -> str:
        return "\n".join(f"{name:20} {value}" for name, value in self.rows)


def dry_run(stage: str, preset: Preset, num_workers: int, device: str | None = None) -> str:
    """A table for people."""
    return needed(stage, preset, num_workers, device).text()


def needed(stage: str, preset: Preset, num_workers: int, device: str | None = None) -> Need:
    """Size up one stage on such a device, "" or None for CUDA where there is one."""
    config = preset.stage(stage)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = estimate(stage, config, preset.model, num_workers, place)
    speed = (peak_flops(place, config.precision) or 0.0) * 0.3 or _measured_speed(place, config.precision)
    seconds = config.steps * result.flops_per_step / (speed * num_workers)
    rows = [
        ("stage", f"{stage} of preset {preset.name}"),
        ("trained parameters", f"{result.parameters:,}"),
        ("frozen parameters", f"{result.frozen_parameters:,}"),
        ("workers", f"{num_workers} on {place.type}, ZeRO {config.zero_stage}, {config.precision}"),
        ("global batch", f"{config.global_batch}, {config.micro_batch or config.global_batch // num_workers} at once"),
        ("buckets", f"{bucket_size(result.parameters) / 1e6:,.1f} million values reduced at once"),
        (
            "memory of a worker",
            f"{_size(result.total_bytes)}: state {_size(result.state_bytes)}, "
            f"activations about {_size(result.activation_bytes)}",
        ),
        ("steps", f"{config.steps:,}"),
        ("work of a step", f"{result.flops_per_step / 1e9:,.1f} GFLOP"),
        ("time", f"about {format_seconds(seconds)} at {speed / 1e9:,.0f} GFLOP/s a worker"),
    ]
    facts = {
        "stage": stage,
        "preset": preset.name,
        "workers": num_workers,
        "device": place.type,
        "steps": config.steps,
        "global_batch": config.global_batch,
        **dataclasses.asdict(result),
        "total_bytes": result.total_bytes,
        "seconds": seconds,
    }
    return Need(tuple(rows), facts)


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
