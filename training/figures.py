"""A run's figures: loss terms that are collected step by step on the device, and the rates at which it goes.

Nothing is read from the device before a report; then all steps since the last one are read at once and averaged over
the workers. What must survive a restart is in `state_dict`.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.context import Context
from training.estimate import estimate, peak_flops
from training.not_finite import Fault, Report, SkippedSteps, merged


@dataclass(frozen=True)
class Summary:
    """Steps since the last report: means over those that count, and rates. fatal: what ends the run, which is a loss
    that is not finite or more skipped steps than are allowed; None where it may go on."""

    values: dict[str, float]
    step_seconds: float
    fatal: list[Fault] | None = None


class Figures:
    """Those of one run of one stage. first, last: the figures of the first and the newest report. sample_order: a hash
    of the ids of all samples so far, in order. seconds: that steps have taken."""

    def __init__(self, context: Context) -> None:
        self.context, self.config, self.world = context, context.config, context.world
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.sample_order = ""
        self.seconds = 0.0
        self.skipped = SkippedSteps(self.config.max_skipped_steps)
        # In fp16 the loss scale is found by gradients that overflow now and then; such a step changes nothing.
        self._window = _Window(checks_norms=self.config.precision != "fp16")
        self._step_started = 0.0
        self._peak_flops = peak_flops(self.world.device, self.config.precision)
        if self._peak_flops:
            self._work = estimate(context.stage, self.config, context.model, self.world.size)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "first": self.first,
            "last": self.last,
            "sample_order": self.sample_order,
            "skipped": list(self.skipped.faults),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the first report begins now. A checkpoint of an earlier version names no skipped steps."""
        self._window.clear()
        self.seconds = float(state["seconds"])
        self.first, self.last = dict(state["first"]), dict(state["last"])
        self.sample_order = state["sample_order"]
        self.skipped.faults = [(int(step), list(ids)) for step, ids in state.get("skipped", [])]

    # --- a step -------------------------------------------------------------------------------------------------------

    def start_waiting(self) -> None:
        """A step begins with waiting for its batch."""
        self._step_started = time.perf_counter()

    def start_step(self, step: int, ids: list[str]) -> None:
        """The batch is here. ids: of this worker's samples."""
        self._window.start_step(step, time.perf_counter() - self._step_started, ids)

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        """Loss terms of one micro-batch, which is this share of the step."""
        self._window.add(terms, share)

    def end_step(self, norm: Tensor | float, lr: float) -> None:
        """The optimizer's step is made: global gradient norm, on the device, and learning rate."""
        self._window.lr = lr
        self._window.end_step(norm)

    def stop_clock(self) -> None:
        """All that belongs to the step is done."""
        self.seconds += time.perf_counter() - self._step_started

    # --- a report -----------------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Figures of the steps since the last report, averaged over the workers. Skipped ones are counted and logged.
        Collective."""
        window = self._window
        local = window.values()
        skipped, broken = window.faults()
        local |= {"step_seconds": window.elapsed() / len(window.steps)}
        local |= {"num_skipped": float(len(skipped)), "num_broken": float(len(broken))}
        names = sorted(local)
        mean = self.world.mean(torch.tensor([local[name] for name in names], dtype=torch.float64))
        values = dict(zip(names, mean.tolist()))
        seconds, num_skipped, num_broken = (values.pop(name) for name in ("step_seconds", "num_skipped", "num_broken"))
        if num_broken > 0 or not all(math.isfinite(values[name]) for name in window.sums):
            return Summary(values, seconds, fatal=merged(self.world.gather(broken)))
        if num_skipped > 0:
            self.skipped.add(self.context.stage, merged(self.world.gather(skipped)), log=self.world.is_main)
            if self.skipped.is_over:
                return Summary(values, seconds, fatal=self.skipped.faults[-1:])
        if num_skipped == len(window.steps):  # no step counted
            values = {name: value for name, value in values.items() if name not in window.sums}
        return Summary({**values, **self._rates()}, seconds)

    def keep(self, values: dict[str, float]) -> dict[str, float]:
        """The report's figures are complete → the same with the number of skipped steps. The next report begins here.
        Collective."""
        if self.skipped.faults:
            values = {**values, "skipped_steps": float(len(self.skipped.faults))}
        if "loss" in values:
            self.first = self.first or values
        self.last = {**self.last, **values}
        for ids in zip(*self.world.gather(self._window.ids)):
            self.sample_order = _chain(self.sample_order, [i for share in ids for i in share])
        self._window.clear()
        return values

    def _rates(self) -> dict[str, float]:
        window = self._window
        elapsed = max(window.elapsed(), 1e-9)
        rates = {
            "lr": window.lr,
            "grad_norm": float(window.norms[-1]),
            "images_per_s": self.config.global_batch * len(window.ids) / elapsed,
            "data_wait_percent": 100.0 * window.waited / elapsed,
            "peak_memory_mb": peak_memory_mb(self.world.device),
            "workers": float(self.world.size),
        }
        if self._peak_flops:
            done = sum(self._work.flops_at(step) for step in window.steps) / elapsed
            rates["mfu_percent"] = 100.0 * done / (self._peak_flops * self.world.size)
        return {name: value for name, value in rates.items() if math.isfinite(value)}

    def percent_of_run(self, seconds: float) -> float:
        """Share of the run so far that `seconds` are."""
        whole = self.seconds + time.perf_counter() - self._step_started
        return 100.0 * seconds / max(whole, 1e-9)

    def note(self) -> str:
        """The newest loss terms and rates in a few words; "" before the first report."""
        if not self.last:
            return ""
        rate, wait = self.last["images_per_s"], self.last["data_wait_percent"]
        terms = " ".join(f"{k} {v:.4g}" for k, v in self.last.items() if k in self._window.names)
        return f"{terms} · {rate:.1f} images/s · data-wait {wait:.1f}%"


class _Window:
    """What is collected since the last report. `checks_norms`: a step whose gradient is not finite was skipped, and
    does not count in the means."""

    def __init__(self, *, checks_norms: bool) -> None:
        self.names: set[str] = set()
        self.lr, self.checks_norms = 0.0, checks_norms
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.ids: list[list[str]] = []
        self.steps: list[int] = []
        self.waited = 0.0
        self.started = time.perf_counter()
        self._step_sums: dict[str, Tensor] = {}

    def start_step(self, step: int, waited: float, ids: list[str]) -> None:
        self.steps.append(step)
        self.ids.append(ids)
        self.waited += waited

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        """One micro-batch."""
        for name, value in terms.items():
            value = value.double() * share
            self._step_sums[name] = self._step_sums[name] + value if name in self._step_sums else value
        self.names.update(terms)

    def end_step(self, norm: Tensor | float) -> None:
        """The step's gradient norm is known, on the device: nothing waits for it here."""
        loss = self._step_sums["loss"]
        norm = norm if isinstance(norm, Tensor) else torch.tensor(norm, device=loss.device)
        for name, value in self._step_sums.items():
            counted = torch.where(norm.isfinite(), value, 0.0) if self.checks_norms else value
            self.sums[name] = self.sums[name] + counted if name in self.sums else counted
        self.losses.append(loss.float())
        self.norms.append(norm.float())
        self._step_sums = {}

    def values(self) -> dict[str, float]:
        """Means over the steps that count, 0 where none does."""
        norms = torch.stack(self.norms)
        counted = int(norms.isfinite().sum()) if self.checks_norms else len(self.steps)
        return {name: float(total) / max(1, counted) for name, total in self.sums.items()}

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def faults(self) -> tuple[list[Report], list[Report]]:
        """Steps that were skipped, and those with a loss that is not finite though their gradient is."""
        # One wait for the device, not one a step.
        losses, norms = torch.stack(self.losses).tolist(), torch.stack(self.norms).tolist()
        skipped, broken = [], []
        for step, loss, norm, ids in zip(self.steps, losses, norms, self.ids):
            report = Report(step, ids, not math.isfinite(loss))
            if self.checks_norms and not math.isfinite(norm):
                skipped.append(report)
            elif report.has_bad_loss:
                broken.append(report)
        return skipped, broken


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the device for CUDA, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def _chain(previous: str, ids: list[str]) -> str:
    return hashlib.sha256(" ".join([previous, *ids]).encode()).hexdigest()
