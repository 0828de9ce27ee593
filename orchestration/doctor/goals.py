"""How fast the first GPU must be: alignment stage 2 of ffhq-256 at full width, and `liif`, beside their goals. A part
of `latentzoom doctor --gpu`; a rehearsal on a CPU has a fraction of the width, and its figures mean nothing.

Stage 2 runs as users run it, from shards, compiled where it is by default. Then the same engine, with what is compiled,
takes the same steps with all bookkeeping removed: no loader, no figures, no checks, random numbers as they come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestration.bench.align import AlignStep, narrow_preset
from orchestration.bench.inputs import make_shards
from pipeline.metrics.speed import wait_for
from training.config import Preset, override
from training.engine import Engine
from training.paper_presets import ffhq_256
from training.run import train
from training.stages import align
from training.targets import draw_target

WAIT_PERCENT, HOST_READS, SHARE_OF_BARE, SHARE_OF_PEAK = 2.0, 0.0, 85.0, 45.0
_SIDE = 2048
_TINY = ["model.image_size=64", "align.min_size=16", "align.max_size=64"]


def measure(device: str, folder: Path) -> dict[str, Any]:
    """All goals with what was measured: name → `goal`'s figure, or a further figure."""
    is_tiny = not device.startswith("cuda")
    preset = override(narrow_preset(1 / 16, 2), _TINY) if is_tiny else ffhq_256()
    return {**stage2(preset, device, folder, 2 if is_tiny else 30), **liif(device, 64 if is_tiny else _SIDE)}


def goal(measured: float, sign: str, bound: float) -> dict[str, Any]:
    """A figure with its goal: `measured` must be at most ("<=") or at least (">=") `bound`, or below it ("<")."""
    is_met = {"<": measured < bound, "<=": measured <= bound, ">=": measured >= bound}[sign]
    return {"measured": measured, "goal": f"{sign} {bound:g}", "met": is_met}


def stage2(preset: Preset, device: str, folder: Path, num: int) -> dict[str, Any]:
    """num steps to warm up, in which the network is compiled, and num that are measured."""
    data, bundle = make_shards(folder, preset.model)
    config = dataclasses.replace(preset.align, steps=2 * num + 1, log_every=num, grid_every=0, checkpoint_every=10**6)
    config = dataclasses.replace(config, validate_every=0, bundle_every=0)
    preset = dataclasses.replace(preset, align=config)
    with host_reads(device) as reads, _watched(reads, last=2 * num) as watch, contextlib.suppress(_Enough):
        train("align", preset, data=data, run_dir=str(folder / "run"), bundle=bundle, device=device)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rate = rows[-1]["images_per_s"] / preset.align.global_batch
    # After the report of step `num`, and before that of the last one.
    asked = watch.places[watch.counts[num] : watch.counts[-1]]
    bare = _bare_rate(watch.engine, preset, device, range(num + 1, 2 * num + 1))
    figures = {
        "stage 2: data wait, %": goal(rows[-1]["data_wait_percent"], "<", WAIT_PERCENT),
        "stage 2: host synchronisations a step": goal(len(asked) / (num - 1), "<=", HOST_READS),
        "stage 2: steps/s, % of those without bookkeeping": goal(100 * rate / bare, ">=", SHARE_OF_BARE),
        "stage 2: steps/s": rate,
        "stage 2: steps/s without bookkeeping": bare,
    }
    if "mfu_percent" in rows[-1]:
        figures["stage 2: model FLOP utilisation, %"] = rows[-1]["mfu_percent"]
    if asked:
        figures["stage 2: where the host waits"] = ", ".join(sorted(set(asked)))
    return figures


def liif(device: str, side: int) -> dict[str, Any]:
    """The head's share of the device's measured rate of matrix products, side² pixels."""
    from orchestration.bench.decode import liif_alone
    from orchestration.bench.measure import matrix_peak
    from orchestration.bench.table import Options

    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    options = Options(device=device, dtype=dtype, rounds=5)
    peak = matrix_peak(options)
    row = liif_alone(options, peak, side)
    assert row.share_of_peak is not None
    return {
        f"liif {side}² {dtype}, % of the matrix rate": goal(100 * row.share_of_peak, ">=", SHARE_OF_PEAK),
        f"liif {side}², {row.unit}": row.rate,
        "matrix products, GMAC/s": peak / 1e9,
    }


def _bare_rate(engine: Engine, preset: Preset, device: str, steps: range) -> float:
    """Steps a second of the engine alone, at the target sizes of `steps`; some of them once before, to warm up."""
    step = AlignStep("neighbourhood", preset, torch.device(device), engine=engine)
    targets = [draw_target(preset.align, preset.model, number) for number in steps]
    started = 0.0
    for number, target in enumerate([*targets[:3], *targets]):
        if number == 3:
            wait_for(device)
            started = time.perf_counter()
        step.learn(number, target)
    wait_for(device)
    return len(targets) / (time.perf_counter() - started)


class _Enough(Exception):
    """All steps are measured: the run ends here, and nobody needs its checkpoint of some gigabytes."""


@dataclasses.dataclass
class _Watch:
    """places: where the host waited so far; counts: how many of them were there after each optimizer step."""

    places: list[str]
    counts: list[int]
    engine: Any = None


@contextlib.contextmanager
def _watched(places: list[str], last: int) -> Iterator[_Watch]:
    """Within, a run of stage 2 tells of its engine and each of its steps, and ends before the one after `last`."""
    watch, original = _Watch(places, []), align.make_engine

    def make_engine(*arguments: Any, **options: Any) -> Engine:
        engine: Any = original(*arguments, **options)
        watch.engine = engine
        take = engine.step

        def step(number: int, lr: float) -> torch.Tensor:
            if number > last:
                raise _Enough
            norm = take(number, lr)
            watch.counts.append(len(places))
            return norm

        engine.step = step
        return cast(Engine, engine)

    stage: Any = align
    stage.make_engine = make_engine
    try:
        yield watch
    finally:
        stage.make_engine = original
        if watch.engine is not None:
            vars(watch.engine).pop("step", None)


@contextlib.contextmanager
def host_reads(device: str) -> Iterator[list[str]]:
    """Within, the places are listed ("file:line") where the host waits for the device: on CUDA by torch's own debug
    mode, elsewhere operations whose result the program reads."""
    places: list[str] = []
    if not device.startswith("cuda"):
        with _HostReads(places):
            yield places
        return

    def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            places.append(f"{Path(filename).name}:{lineno}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _HostReads(TorchDispatchMode):
    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING:
            frames = traceback.extract_stack()
            if not any(frame.name in _ON_THE_HOST for frame in frames):
                *_, asked = (frame for frame in frames[:-1] if "/torch/" not in frame.filename)
                self.places.append(f"{Path(asked.filename).name}:{asked.lineno}")
        return func(*args, **(kwargs or {}))


_ASKING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
_ON_THE_HOST = {"draw_target"}
"""Functions whose numbers are drawn on the CPU, wherever training runs."""
