"""The parts that are measured, one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.common_options import note

if TYPE_CHECKING:
    from orchestration.bench.table import Options, Results, Row

PARTS: dict[str, tuple[str, str]] = {
    "preprocess": ("orchestration.bench.preprocess", "bench_preprocess"),
    "stage1": ("orchestration.bench.training", "bench_stage1"),
    "stage2": ("orchestration.bench.training", "bench_stage2"),
    "checkpoint": ("orchestration.bench.checkpoint", "bench_checkpoint"),
    "loader": ("orchestration.bench.loader", "bench_loader"),
    "sampling": ("orchestration.bench.sampling", "bench_sampling"),
    "decode": ("orchestration.bench.decode", "bench_decode"),
    "kernel": ("orchestration.bench.kernel", "bench_kernel"),
    "sr": ("orchestration.bench.sampling", "bench_sr"),
    "starter": ("orchestration.bench.starter", "bench_starter"),
    "workers": ("orchestration.bench.workers", "bench_workers"),
    "memory": ("orchestration.bench.memory", "bench_memory"),
}
"""Part → (module, function from `Options` and the measured matrix rate to rows)."""
COSTLY = ("workers", "memory")
"""Parts that are measured only where they are named."""


def run(options: Options, parts: tuple[str, ...]) -> Results:
    """Measure the named parts one after the other; what is under way goes to standard error."""
    import torch

    from orchestration.bench.measure import matrix_peak
    from orchestration.bench.table import Results, machine

    facts = machine(options)
    if facts["busy"] > 1.0:
        print(f"latentzoom: {facts['busy']} processes a core are running: rates will be low", file=sys.stderr)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    try:
        peak = matrix_peak(options)
        for part in parts:
            note(f"bench: {part} ...")
            module, name = PARTS[part]
            measure: Callable[[Options, float], list[Row]] = getattr(import_module(module), name)
            rows += measure(options, peak)
    finally:
        torch.set_num_threads(before)
    return Results({**facts, "matrix_gmacs": round(peak / 1e9, 1)}, tuple(rows))
