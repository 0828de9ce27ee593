"""How long training stands still for a checkpoint in the background, against writing it in place."""

from __future__ import annotations

import tempfile
import time

import numpy as np
import torch

from orchestration.bench.align import AlignStep, narrow_preset
from orchestration.bench.table import Options, Row
from pipeline.metrics.speed import wait_for
from training.checkpoint import CheckpointStore
from training.snapshots import tensors_of
from training.world import World


def bench_checkpoint(options: Options, peak: float) -> list[Row]:
    """Rates are of the state's bytes: written, synced, hashed and published in place; as long as training stands still
    for the same in the background; and copied only. Then steps alone and beside the writing."""
    del peak  # no operations are counted
    preset = narrow_preset(options.width, batch=1)
    world = World(0, 1, 0, torch.device(options.device))
    step, size = AlignStep("neighbourhood", preset, world.device), preset.model.image_size
    engine = step.engine
    alone, beside, stalls, copies, whole = [], [], [], [], []
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        store = CheckpointStore(folder, world, keep=2)
        for number in range(0, 2 * options.rounds + 2, 2):
            before, start = engine.stall, time.perf_counter()
            store.save(number, engine.name, engine.snapshot().files, {})
            saved = time.perf_counter()
            step(number, size)
            wait_for(world.device)
            stepped = time.perf_counter()
            stalls.append(saved - start + engine.stall - before)
            beside.append(stepped - saved)
            store.wait()

            start = time.perf_counter()
            step(number, size)
            wait_for(world.device)
            alone.append(time.perf_counter() - start)
            start = time.perf_counter()
            files = engine.snapshot().files()
            copied = time.perf_counter()
            store.save(number + 1, engine.name, lambda files=files: files, {})  # type: ignore[misc]
            store.wait()
            copies.append(copied - start)
            whole.append(time.perf_counter() - copied)
    # The first of each also allocates, and does not count.
    stall, copy, total, free, busy = (float(np.median(each[1:])) for each in (stalls, copies, whole, alone, beside))
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(files)) / 1e6
    taken = {"straightforward": total, "in the background": stall, "copy alone": copy}
    notes = {"in the background": f"training stands still {1e3 * stall:.2f} ms for {megabytes:.0f} MB"}
    rows = [
        Row(
            part="checkpoint",
            name=name,
            rate=megabytes / seconds,
            unit="MB/s",
            seconds=seconds,
            ratio=total / seconds,
            note=notes.get(name, ""),
        )
        for name, seconds in taken.items()
    ]
    for name, seconds in (("step", free), ("step beside the writing", busy)):
        rows.append(Row(part="checkpoint", name=name, rate=1 / seconds, unit="steps/s", seconds=seconds))
    return rows
