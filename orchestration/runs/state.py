"""How far one training run is, and a table of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.text_table import text_table
from pipeline.progress import format_seconds

Curves = dict[str, list[tuple[int, float]]]
"""Figure → (optimizer step, value), by step. Only finite values."""

RATES = frozenset(
    ("lr", "grad_norm", "images_per_s", "data_wait_percent", "validate_percent", "peak_memory_mb", "workers")
    + ("mfu_percent", "skipped_steps")
)
"""What tells how a run goes, not how good the model is."""
_NUM_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class RunState:
    """One run of one stage. place: its folder, or its id in the store. state: "done", "running", "killed" and "failed"
    (as the store says) or "silent": nothing was written for longer than between reports. images_per_s, eta_s and
    silent_s (seconds since the last report) are None where they are not known. figures: the newest value of each.
    grid: where the newest picture grid is, or ""."""

    place: str
    stage: str
    state: str
    step: int
    steps: int
    images_per_s: float | None
    eta_s: float | None
    silent_s: float | None
    figures: Mapping[str, float]
    grid: str


def curves_of(lines: Iterable[Mapping[str, Any]]) -> Curves:
    """Lines of `metrics.jsonl` (each has "step" and some figures) → curves."""
    curves: Curves = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append((int(line["step"]), float(value)))
    return {name: sorted(points) for name, points in curves.items()}


def run_state(
    curves: Curves,
    *,
    place: str,
    stage: str,
    state: str,
    steps: int,
    global_batch: int,
    silent_s: float | None,
    grid: str,
) -> RunState:
    """The state of a run with these curves. The time that is left follows from the last report's rate."""
    step = max((points[-1][0] for points in curves.values()), default=0)
    figures = {name: points[-1][1] for name, points in curves.items()}
    rate = figures.get("images_per_s")
    eta = max(0, steps - step) * global_batch / rate if state == "running" and rate and global_batch else None
    return RunState(
        place=place,
        stage=stage,
        state=state,
        step=step,
        steps=steps,
        images_per_s=rate,
        eta_s=eta,
        silent_s=silent_s,
        figures=figures,
        grid=grid,
    )


def table(runs: Sequence[RunState]) -> str:
    """One line a run."""
    rows = [("run", "stage", "state", "step", "images/s", "ETA", "figures", "newest grid")]
    for run in runs:
        state = run.state
        if state == "silent" and run.silent_s is not None:
            state = f"silent for {format_seconds(run.silent_s)}"
        rows.append(
            (
                run.place,
                run.stage,
                state,
                f"{run.step}/{run.steps}" if run.steps else f"{run.step}",
                "" if run.images_per_s is None else f"{run.images_per_s:.1f}",
                "" if run.eta_s is None else format_seconds(run.eta_s),
                _figures(run.figures),
                run.grid,
            )
        )
    return text_table(rows)


def _figures(figures: Mapping[str, float]) -> str:
    """The loss, then figures of held-out images, then the loss's terms; a line has room for few."""
    names = [name for name in figures if name not in RATES]
    names.sort(key=lambda name: (name != "loss", not name.startswith(("val/", "quality/"))))
    shown = [f"{name} {figures[name]:.4g}" for name in names[:_NUM_SHOWN]]
    return ", ".join([*shown, "…"] if len(names) > _NUM_SHOWN else shown)
