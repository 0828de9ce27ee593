"""One step of alignment stage 2, as the preset does it and the straightforward way: what
`latentzoom bench --only stage2` compares.

Every way has the same engine (clipping, Adam, averaged weights) and precision, and the same target sizes: spread evenly
over the preset's range, the largest one first.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import resource
import sys
import time
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pipeline.autoencoder import Autoencoder
from pipeline.bundle import build_autoencoder, build_decoder, build_denoiser
from pipeline.decoder import ImplicitDecoder
from pipeline.diffusion import Schedule
from pipeline.geometry import axis_range
from pipeline.liif import LiifHead
from pipeline.metrics.speed import wait_for
from training.config import AlignStage, Preset
from training.engine import Engine, make_engine
from training.losses import alignment_loss, diffusion_weight
from training.paper_presets import ffhq_256
from training.precision import frozen_precision
from training.targets import Target, draw_target, render_target, size_range
from training.world import World

KINDS = ("straightforward", "cached", "neighbourhood", "frugal")
"""Ways to do a step: the straightforward one; cached latents with D_phi on the whole latent (exact); the preset as it
is, D_phi on the window's neighbourhood; and that with activation checkpointing."""


def narrow_preset(width: float, batch: int) -> Preset:
    """ffhq-256 with its sizes, depths, attention and stage-2 settings; its widths and batch changed, in float32."""

    def scaled(base: int) -> int:
        return max(8, round(base * width / 8) * 8)

    preset = ffhq_256()
    # Attention heads keep their width of at most 32 and become fewer: narrow heads would make attention, whose cost is
    # in its exponentials, weigh several times more than it does at full width.
    model, denoiser_width = preset.model, scaled(224)
    heads = max(n for n in range(1, min(32, denoiser_width) + 1) if denoiser_width % n == 0)
    model = dataclasses.replace(
        model,
        autoencoder=dataclasses.replace(model.autoencoder, base_width=scaled(128), norm_groups=8),
        decoder=dataclasses.replace(model.decoder, base_width=scaled(128), norm_groups=8, mlp_width=scaled(256)),
        denoiser=dataclasses.replace(model.denoiser, base_width=denoiser_width, head_channels=heads, norm_groups=8),
    )
    align = dataclasses.replace(preset.align, global_batch=batch, precision="fp32")
    return dataclasses.replace(preset, model=model, align=align)


def settings_of(kind: str, preset: AlignStage) -> AlignStage:
    """The preset's settings as one way changes them. None is compiled, as none is on a CPU: that would take minutes for
    each, and has nothing to do with the way."""
    changes = {
        "straightforward": {"crop": 0, "crop_cells": 0, "channels_last": False, "activation_checkpointing": False},
        "cached": {"context_cells": 0},
        "neighbourhood": {},
        "frugal": {"activation_checkpointing": True},
    }[kind]
    return dataclasses.replace(preset, compile=False, **changes)  # type: ignore[arg-type]


class AlignStep:
    """The parts of one way to do stage 2, and its step."""

    def __init__(self, kind: str, preset: Preset, device: torch.device, engine: Engine | None = None) -> None:
        """engine: one that is at work already, with the preset's settings."""
        torch.manual_seed(0)
        self.plain, self.model, self.config = kind == "straightforward", preset.model, settings_of(kind, preset.align)
        model, batch = self.model, self.config.global_batch
        self.encoder: Autoencoder | None = None
        if self.plain:
            self.encoder = build_autoencoder(model).to(device).requires_grad_(False)
        self.decoder = build_decoder(model).to(device).train().requires_grad_(False)
        self.schedule = Schedule(model.schedule)
        self.engine: Engine = engine or make_engine(
            build_denoiser(model), self.config, World(0, 1, 0, device), deepspeed=False
        )
        self.pixels = torch.rand(batch, 3, model.image_size, model.image_size, device=device) * 2 - 1
        cells = model.latent_size
        self.cached = torch.randn(batch, model.autoencoder.latent_channels, cells, cells, device=device)
        if engine is not None:
            return
        # Adam allocates its moments at the first step: they are state, as the weights are, in every way alike.
        for parameter in self.engine.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.engine.step(1, self.config.lr)

    def __call__(self, number: int, side: int) -> None:
        """Optimizer step `number` with targets of `side` pixels."""
        self.learn(
            number, draw_target(dataclasses.replace(self.config, min_size=side, max_size=side), self.model, number)
        )

    def learn(self, number: int, target: Target) -> None:
        """Optimizer step `number` with this target. The whole batch at once, whatever the settings say."""
        config = self.config
        t = torch.randint(0, self.schedule.config.num_steps, (config.global_batch,), device=self.pixels.device)
        z0 = self._latents()
        z_t = self.schedule.add_noise(z0, torch.randn_like(z0), t)
        z0_pred = self.schedule.to_x0(z_t, self.engine(z_t, t, None, None), t)  # as training calls it
        weight = diffusion_weight(self.schedule.snr(t), config.loss, config.weight_clip)
        images = self._render(z0_pred, target), target.truth(self.pixels)
        loss, _, _ = alignment_loss((z0_pred, z0), images, weight, config.loss, config.lambda_dm, config.lambda_recon)
        self.engine.backward(loss)
        self.engine.step(number + 2, config.lr)

    @torch.no_grad()
    def _latents(self) -> Tensor:
        return self.cached if self.encoder is None else self.encoder.encode(self.pixels)

    def _render(self, z0_pred: Tensor, target: Target) -> Tensor:
        with frozen_precision(self.config, z0_pred.device):
            if self.plain:
                return render_plainly(self.decoder, z0_pred, target.size).float()
            return render_target(self.decoder, z0_pred, target, self.config.context_cells).float()


def align_step(kind: str, preset: Preset, device: str, num_steps: int) -> dict[str, float]:
    """Mean seconds of a step, and peak MiB above weights, averages and Adam's moments. Call it in a process of its own.
    On a CPU, where others may run too, seconds are processor time of one thread: several would count the time that they
    wait for each other."""
    if device == "cpu":
        torch.set_num_threads(1)
    place = torch.device(device)
    step = AlignStep(kind, preset, place)
    low, high = size_range(step.config, step.model)
    before = _memory_now(place)
    step(0, high)
    wait_for(place)
    clock = time.process_time if place.type == "cpu" else time.perf_counter
    start = clock()
    for number in range(num_steps):
        step(1 + number, round(low + (number + 0.5) / num_steps * (high - low)))
    wait_for(place)
    seconds = (clock() - start) / num_steps
    peak = _peak_memory(place)
    return {"seconds": seconds, "memory_mb": peak - before}


def render_plainly(decoder: ImplicitDecoder, latent: Tensor, size: tuple[int, int]) -> Tensor:
    """ND as LIIF is usually written: all pixels at once, every corner's feature and place through the whole MLP."""
    features, head = decoder.features(latent), cast(LiifHead, decoder.head)
    rows, cols = (
        axis_range(0, n, n, cells, dtype=features.dtype, device=features.device)
        for n, cells in zip(size, features.shape[-2:])
    )
    image = features.new_zeros(())
    for index_y, rel_y, weight_y in (
        (rows.lower, rows.rel_lower, rows.weight_lower),
        (rows.upper, rows.rel_upper, rows.weight_upper),
    ):
        for index_x, rel_x, weight_x in (
            (cols.lower, cols.rel_lower, cols.weight_lower),
            (cols.upper, cols.rel_upper, cols.weight_upper),
        ):
            corner = features[:, :, index_y][:, :, :, index_x].permute(0, 2, 3, 1)  # (B,H,W,ch)
            place = torch.stack([*torch.meshgrid(rel_y, rel_x, indexing="ij")], dim=-1)
            cell = corner.new_tensor([rows.cell, cols.cell]).expand(*size, 2)
            both = torch.cat([place, cell], dim=-1).expand(len(corner), *size, 4)
            hidden = torch.cat([corner, both], dim=-1)
            for layer in head.hidden:
                hidden = torch.relu(layer(hidden))
            image = image + head.out(hidden) * (weight_y[:, None] * weight_x)[..., None]
    return image.permute(0, 3, 1, 2)


def _memory_now(device: torch.device) -> float:
    """MiB in use, after which `_peak_memory` counts afresh where the system can do that."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    if sys.platform != "linux":
        return _peak_memory(device)
    ctypes.CDLL(None).malloc_trim(0)  # what building the parts freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")
    return _from_status("VmRSS")


def _peak_memory(device: torch.device) -> float:
    """Largest memory since `_memory_now`, in MiB: of the device for CUDA, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        return _from_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024.0)


def _from_status(name: str) -> float:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024.0
