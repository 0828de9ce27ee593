"""How much this project's way of training saves. Prints ratios; run it on an idle machine.

    python -m training.bench {align,loader,checkpoint,workers,all} [--device cuda] [--width 0.25] [--steps 5]

align       stage 2 from cached latents with sampled target windows ("neighbourhood": with align.context_cells = 8,
            "frugal": and with activation checkpointing),
            against the straightforward step: encode the image, decode the whole target through the full ensemble at
            once, no checkpointing (ffhq-256 shapes, reduced width)
loader      share of the time that stage 2 waits for data
checkpoint  how long training stops for an asynchronous checkpoint, against writing and hashing it in place
workers     two Ray Train workers against one, at the same global batch (needs cores to spare)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, save_bundle
from pipeline.config import ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.diffusion import Schedule
from pipeline.geometry import axis_range
from pipeline.liif import LiifHead
from pipeline.resize import resize
from training.checkpoint import CheckpointStore
from training.config import Preset
from training.engine import enable_activation_checkpointing
from training.losses import alignment_loss, diffusion_weight
from training.presets import ffhq_256
from training.session import peak_memory_mb
from training.targets import draw_target, render_target
from training.world import World


def narrow_preset(width: float, batch: int) -> Preset:
    """ffhq-256 with its sizes, depths and attention, its widths scaled."""

    def scaled(base: int) -> int:
        return max(8, round(base * width / 8) * 8)

    preset = ffhq_256()
    model, heads = preset.model, scaled(32)
    denoiser_width = max(heads, scaled(224) // heads * heads)
    model = dataclasses.replace(
        model,
        autoencoder=dataclasses.replace(model.autoencoder, base_width=scaled(128), norm_groups=8),
        decoder=dataclasses.replace(model.decoder, base_width=scaled(128), norm_groups=8, mlp_width=scaled(256)),
        denoiser=dataclasses.replace(model.denoiser, base_width=denoiser_width, head_channels=heads, norm_groups=8),
    )
    align = dataclasses.replace(
        preset.align, global_batch=batch, precision="fp32", channels_last=False, activation_checkpointing=False, crop=64
    )
    return dataclasses.replace(preset, model=model, align=align)


def align_step(kind: str, preset: Preset, device: str, num_steps: int) -> dict[str, float]:
    """Seconds a step and peak memory (MiB above what the parts take) of one way to do stage 2."""
    torch.set_num_threads(max(1, os.cpu_count() or 1))
    torch.manual_seed(0)
    model, config, place = preset.model, preset.align, torch.device(device)
    encoder = build_autoencoder(model).to(place).requires_grad_(False)
    decoder = build_decoder(model).to(place).requires_grad_(False)
    denoiser, schedule = build_denoiser(model).to(place), Schedule(model.schedule)
    if kind == "frugal":
        enable_activation_checkpointing(denoiser)
        enable_activation_checkpointing(decoder)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.lr)
    batch, side = config.global_batch, model.image_size
    pixels = torch.rand(batch, 3, side, side, device=place) * 2 - 1
    cached = torch.randn(batch, model.autoencoder.latent_channels, model.latent_size, model.latent_size, device=place)

    def step(number: int) -> None:
        target = draw_target(dataclasses.replace(config, min_size=side, max_size=side), model, number)
        t = torch.randint(0, 1000, (batch,), device=place)
        if kind == "straightforward":
            with torch.no_grad():
                z0 = encoder.encode(pixels)
        else:
            z0 = cached
        z_t = schedule.add_noise(z0, torch.randn_like(z0), t)
        z0_pred = schedule.to_x0(z_t, denoiser(z_t, t), t)
        if kind == "straightforward":
            rendered, truth = render_plainly(decoder, z0_pred, target.size), resize(pixels, target.size)
        else:
            rendered = render_target(decoder, z0_pred, target, 0 if kind == "cached" else 8)
            truth = target.cut(pixels)
        weight = diffusion_weight(schedule.snr(t), "l2", config.weight_clip)
        loss, _, _ = alignment_loss((z0_pred, z0), (rendered, truth), weight, "l2", 1.0, 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    before = peak_memory_mb(place)
    step(0)
    _wait(place)
    # On a CPU that others use too, the processor time of this process says more than the clock on the wall.
    clock = time.process_time if place.type == "cpu" else time.perf_counter
    start = clock()
    for number in range(1, num_steps + 1):
        step(number)
    _wait(place)
    seconds = (clock() - start) / num_steps
    return {"seconds": seconds, "memory_mb": peak_memory_mb(place) - before, "total_mb": peak_memory_mb(place)}


def bench_align(arguments: argparse.Namespace) -> dict[str, float]:
    """Each way in a process of its own, since peak memory never falls."""
    preset = narrow_preset(arguments.width, arguments.batch)
    rows = {
        kind: _in_process(align_step, kind, preset, arguments.device, arguments.steps)
        for kind in ("straightforward", "cached", "neighbourhood", "frugal")
    }
    slow, results = rows["straightforward"], {}
    clock = "processor s" if arguments.device == "cpu" else "s"
    for kind, row in rows.items():
        speed, memory = slow["seconds"] / row["seconds"], row["memory_mb"] / slow["memory_mb"]
        print(
            f"align {kind:16} {row['seconds']:.3f} {clock} a step, {row['memory_mb']:.0f} MiB above the parts: "
            f"{speed:.2f} times the steps/s (goal 3), {memory:.2f} of the memory (goal 0.33)"
        )
        results.update({f"align_{kind}_speed": speed, f"align_{kind}_memory": memory})
    return results


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


def bench_checkpoint(arguments: argparse.Namespace) -> dict[str, float]:
    """The copy that training waits for, against writing, syncing, hashing and publishing in place."""
    from training.engine import make_engine

    preset = narrow_preset(arguments.width, 1)
    world = World(0, 1, 0, torch.device(arguments.device))
    engine = make_engine(build_denoiser(preset.model), preset.align, world, deepspeed=False)
    engine.module(torch.randn(1, 3, 64, 64, device=world.device), torch.zeros(1, dtype=torch.int64)).sum().backward()
    engine.step(1, 1e-4)
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        store = CheckpointStore(folder, world, keep=2)
        stalls, whole = [], []
        for step in range(1, 5):
            start = time.perf_counter()
            store.save(step, engine.name, engine.snapshot(), {})
            stalls.append(time.perf_counter() - start)
            store.wait()
            whole.append(time.perf_counter() - start)
    stall, total = min(stalls[1:]), min(whole[1:])  # the first one also allocates
    print(
        f"checkpoint: training stops {stall * 1e3:.1f} ms of {total * 1e3:.1f} ms, {100 * stall / total:.1f} % (goal 5)"
    )
    return {"checkpoint_stall_percent": 100 * stall / total}


def bench_loader(arguments: argparse.Namespace) -> dict[str, float]:
    """Stage 2 from shards, as users run it."""
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        preset = narrow_preset(arguments.width, arguments.batch)
        data, bundle = _make_shards(Path(folder), preset.model)
        config = dataclasses.replace(
            preset.align, steps=3 * arguments.steps, log_every=1, grid_every=0, checkpoint_every=10**6
        )
        from training.run import train

        preset = dataclasses.replace(preset, align=config)
        train("align", preset, data=data, run_dir=f"{folder}/run", bundle=bundle, device=arguments.device)
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    wait = float(np.mean([row["data_wait_percent"] for row in rows[1:]]))
    print(f"loader: stage 2 waits {wait:.2f} % of the time for data (goal 2)")
    return {"data_wait_percent": wait}


def bench_workers(arguments: argparse.Namespace) -> dict[str, float]:
    """One worker with one core against two with one core each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 4 and arguments.device == "cpu":
        print(f"workers: this machine has {cores} cores, too few to tell (4 are needed: two workers, Ray, the loader)")
    from importlib import import_module

    # Ray is the caller's room: this program measures it, and nothing here depends on it.
    launch: Callable[..., Any] = import_module("orchestration.ray_train").launch
    speeds = {}
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        preset = narrow_preset(arguments.width, 2 * arguments.batch)
        data, bundle = _make_shards(Path(folder), preset.model)
        config = dataclasses.replace(
            preset.align, steps=2 * arguments.steps, log_every=arguments.steps, grid_every=0, checkpoint_every=10**6
        )
        preset = dataclasses.replace(preset, align=config)
        for num in (1, 2):
            gpus = 1.0 if arguments.device == "cuda" else 0.0
            run = launch(
                "align", preset, data=data, run_dir=f"{folder}/{num}", bundle=bundle, num_workers=num,
                gpus_per_worker=gpus, cpus_per_worker=1,
            )  # fmt: skip
            speeds[num] = run.metrics["images_per_s"]
    print(f"workers: two train {speeds[2] / speeds[1]:.2f} times as fast as one (goal 1.6)")
    return {"two_workers_speed": speeds[2] / speeds[1]}


def _make_shards(folder: Path, model: ModelConfig) -> tuple[str, str]:
    from PIL import Image

    from preprocess.config import PreprocessConfig
    from preprocess.run import preprocess

    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        small = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(small).resize((300, 300), Image.Resampling.BICUBIC).save(folder / f"pictures/{i}.png")
    torch.manual_seed(0)
    bundle = Bundle(model, build_autoencoder(model), build_decoder(model), build_denoiser(model))
    save_bundle(str(folder / "bundle"), bundle)
    config = PreprocessConfig(
        source="folder",
        source_url=str(folder / "pictures"),
        dest=str(folder / "data"),
        size=model.image_size,
        autoencoder=str(folder / "bundle"),
        samples_per_shard=8,
        batch_size=4,
    )
    preprocess(config)
    return str(folder / "data"), str(folder / "bundle")


def _in_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_BENCHES = {"align": bench_align, "loader": bench_loader, "checkpoint": bench_checkpoint, "workers": bench_workers}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks; the last line is all ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=[*_BENCHES, "all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=float, default=0.25, help="widths relative to ffhq-256")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args(argv)
    results: dict[str, float] = {}
    for name, bench in _BENCHES.items():
        if arguments.which in (name, "all"):
            results.update(bench(arguments))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
