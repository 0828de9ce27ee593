"""Two Ray Train workers against one, at the same global batch."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from pathlib import Path

import torch

from orchestration.bench.align import narrow_preset
from orchestration.bench.inputs import make_shards
from orchestration.bench.table import Options, Row
from pipeline.extras import install

BATCH = 4
"""Images a training step, of all workers together."""
CORES = 4
"""What two workers, Ray and the loader need to say anything."""


def bench_workers(options: Options, peak: float) -> list[Row]:
    """Alignment stage 2 by one worker and by two, each with one GPU, or one core. Where there are too few: one row that
    says so."""
    del peak  # the workers report no operations
    if reason := _lacks(options.device):
        return [Row(part="workers", name="not run", note=reason)]
    from orchestration.cluster.ray_train import launch

    preset = narrow_preset(options.width, BATCH)
    steps = 4 * (1 if options.quick else options.rounds)
    config = dataclasses.replace(preset.align, steps=steps, log_every=steps // 2, grid_every=0, checkpoint_every=10**6)
    config = dataclasses.replace(config, validate_every=0, bundle_every=0)
    preset = dataclasses.replace(preset, align=config)
    rates = {}
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        data, bundle = make_shards(Path(folder), preset.model)
        for num, name in ((1, "straightforward: one worker"), (2, "two workers")):
            run = launch(
                "align", preset, data=data, run_dir=f"{folder}/{num}", bundle=bundle, num_workers=num,
                gpus_per_worker=1.0 if options.device.startswith("cuda") else 0.0, cpus_per_worker=1,
            )  # fmt: skip
            rates[name] = run.metrics["images_per_s"]
    first = next(iter(rates.values()))
    return [
        Row(part="workers", name=name, rate=rate, unit="images/s", ratio=rate / first) for name, rate in rates.items()
    ]


def _lacks(device: str) -> str:
    """What this machine needs for two workers; empty where it has that."""
    if importlib.util.find_spec("ray") is None:
        return f"needs Ray: {install('cluster')}"
    if device.startswith("cuda"):
        num = torch.cuda.device_count()
        return "" if num > 1 else f"needs two GPUs, here is {num}"
    num = _cores()
    return "" if num >= CORES else f"needs {CORES} cores for two workers, Ray and the loader, here are {num}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
