"""How much this project's way of training saves. Prints ratios; run it on an idle machine.

    python -m orchestration.bench.stages {align,loader,checkpoint,workers,all} [--device cuda] [--width 0.25]
        [--steps 6]

align       stage 2 as the ffhq-256 preset does it ("neighbourhood"; "cached": D_phi on the whole latent, which is
            exact; "frugal": with activation checkpointing), against the straightforward step: encode the image, decode
            the whole target through the full ensemble at once, no checkpointing. Reduced width, the preset's sizes
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
from typing import Any

import numpy as np
import torch

from orchestration.bench.align import KINDS, AlignStep, align_step
from orchestration.bench.align import narrow_preset as narrow_preset
from orchestration.bench.align import render_plainly as render_plainly
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, save_bundle
from pipeline.config import ModelConfig
from training.checkpoint import CheckpointStore
from training.paper_presets import ffhq_256
from training.snapshots import tensors_of
from training.world import World


def bench_align(arguments: argparse.Namespace) -> dict[str, float]:
    """Each way in a process of its own, since what a process held stays in its heap; in turns, the fastest counts."""
    precision = arguments.precision or ffhq_256().align.precision
    preset = narrow_preset(arguments.width, arguments.batch, precision)
    rows: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for kind in KINDS:
            row = _in_process(align_step, kind, preset, arguments.device, arguments.steps)
            best = rows.setdefault(kind, row)
            rows[kind] = {name: min(value, best[name]) for name, value in row.items()}
    slow, results = rows["straightforward"], {}
    clock = "processor s" if arguments.device == "cpu" else "s"
    for kind, row in rows.items():
        speed = slow["seconds"] / row["seconds"]
        memory, total = row["memory_mb"] / max(slow["memory_mb"], 1.0), row["total_mb"] / slow["total_mb"]
        print(
            f"align {kind:16} {precision} {row['seconds']:.3f} {clock} a step, {row['memory_mb']:.0f} MiB above state: "
            f"{speed:.2f} times the steps/s (goal 3), {memory:.2f} of the memory (goal 0.33), {total:.2f} of all memory"
        )
        results.update({f"align_{kind}_speed": speed, f"align_{kind}_memory": memory, f"align_{kind}_total": total})
    return results


def bench_checkpoint(arguments: argparse.Namespace) -> dict[str, float]:
    """How long training stands still for a checkpoint in the background, against writing, syncing, hashing and
    publishing the same state in place. Medians of several; the first ones also allocate and do not count."""
    preset = narrow_preset(arguments.width, 1)
    world = World(0, 1, 0, torch.device(arguments.device))
    step = AlignStep("neighbourhood", preset, world.device)
    engine = step.engine
    alone, beside, stalls, copies, whole = [], [], [], [], []
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-", dir=arguments.folder) as folder:
        store = CheckpointStore(folder, world, keep=2)
        for number in range(0, 2 * arguments.repeats + 2, 2):
            before, start = engine.stall, time.perf_counter()
            store.save(number, engine.name, engine.snapshot().files, {})
            saved = time.perf_counter()
            step(number, preset.model.image_size)
            stepped = time.perf_counter()
            stalls.append(saved - start + engine.stall - before)
            beside.append(stepped - saved)
            store.wait()

            start = time.perf_counter()
            step(number, preset.model.image_size)
            alone.append(time.perf_counter() - start)
            start = time.perf_counter()
            files = engine.snapshot().files()
            copied = time.perf_counter()
            store.save(number + 1, engine.name, lambda files=files: files, {})  # type: ignore[misc]
            store.wait()
            copies.append(copied - start)
            whole.append(time.perf_counter() - copied)
    stall, copy, total, free, busy = (1e3 * float(np.median(v[1:])) for v in (stalls, copies, whole, alone, beside))
    size = sum(t.numel() * t.element_size() for t in tensors_of(files)) / 2**20
    print(
        f"checkpoint: training stands still {stall:.2f} ms for {size:.0f} MiB; in place it is {total:.0f} ms "
        f"({1e3 * size / total:.0f} MiB/s): {100 * stall / total:.2f} % (goal 5). The copy alone: {copy:.0f} ms "
        f"({1e3 * size / copy:.0f} MiB/s), {100 * copy / total:.1f} %. A step beside the writing: {busy:.0f} ms, "
        f"otherwise {free:.0f} ms"
    )
    return {"checkpoint_stall_percent": 100 * stall / total, "checkpoint_copy_percent": 100 * copy / total}


def bench_loader(arguments: argparse.Namespace) -> dict[str, float]:
    """Stage 2 from shards, as users run it."""
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        preset = narrow_preset(arguments.width, arguments.batch)
        data, bundle = make_shards(Path(folder), preset.model)
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
    launch: Callable[..., Any] = import_module("orchestration.cluster.ray_train").launch
    speeds = {}
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        preset = narrow_preset(arguments.width, 2 * arguments.batch)
        data, bundle = make_shards(Path(folder), preset.model)
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


def make_shards(folder: Path, model: ModelConfig) -> tuple[str, str]:
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


_BENCHES = {"align": bench_align, "loader": bench_loader, "checkpoint": bench_checkpoint, "workers": bench_workers}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks; the last line is all ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=[*_BENCHES, "all"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=float, default=0.25, help="widths relative to ffhq-256")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2, help="of align: how often each way runs")
    parser.add_argument("--repeats", type=int, default=7, help="of checkpoint: how many are written each way")
    parser.add_argument(
        "--folder", help="of checkpoint: where they are written; default: the system's temporary folder"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of every way of align; default: the preset's")
    arguments = parser.parse_args(argv)
    results: dict[str, float] = {}
    for name, bench in _BENCHES.items():
        if arguments.which in (name, "all"):
            results.update(bench(arguments))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
