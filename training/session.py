"""What every stage's loop does besides its loss: batches, optimizer steps, figures, checkpoints, and stopping.

A stage reads:  for micro in session.micro_batches(...): session.backward(loss, terms)  …  session.end_step().
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import Stopped, UserError
from pipeline.migrations import CONFIG_VERSION
from pipeline.progress import Progress
from preprocess.sample import Batch
from training.checkpoint import CheckpointStore, Saved
from training.config import StageConfig
from training.context import Context
from training.engine import Engine, accumulation_steps
from training.estimate import estimate, peak_flops
from training.noise import Draws
from training.not_finite import Fault, Report, SkippedSteps, merged
from training.optim import generator_for, lr_at
from training.profiling import StepProfiler
from training.reporter import Reporter
from training.stopping import Stop

_log = logging.getLogger("latentzoom")
_ASK_SECONDS = 2.0
"""Seconds between two questions whether to stop, or one step where that takes longer."""


class Stateful(Protocol):
    """Something a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Batches(Stateful, Protocol):
    """What a session reads from: an endless stream whose position can be stored."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class Watching(Protocol):
    """What is measured and written while a stage trains (`training.watch`). over: the stage ends early."""

    over: bool
    seconds: float

    def due(self, step: int) -> bool:
        """Whether something is to be done after this step."""

    def after(self, step: int) -> dict[str, float]:
        """Do it → held-out figures, the same on every worker. Collective."""

    def note(self) -> str:
        """The newest of them in a few words."""

    def state_dict(self) -> dict[str, Any]: ...

    def go_on(self, state: dict[str, Any], step: int) -> None:
        """Begin after `step`, with the state that the checkpoint has; {} for a new run."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class MicroBatch:
    """Some samples of a batch on the training device. `index`: their places in the global batch.

    pixels (B,3,H,W) float in [-1,1]; latents and condition (B,S,h,w) stored, unscaled.
    """

    index: range
    pixels: Tensor | None
    latents: Tensor | None
    condition: Tensor | None

    def draws(self, *key: int | str) -> Draws:
        """Random numbers of these samples on their device, the same ones whatever worker holds them."""
        device = next(t.device for t in (self.latents, self.pixels, self.condition) if t is not None)
        return Draws(self.index, device, *key)


class Session:
    """One run of one stage on one worker, from where the last one stopped. Iterating yields (step, batch)."""

    def __init__(self, context: Context, engine: Engine, loader: Batches) -> None:
        self.context, self.engine, self.loader = context, engine, loader
        self.config: StageConfig = context.config
        self.world = context.world
        self.accumulation = accumulation_steps(self.config, self.world.size)
        self.store = CheckpointStore(context.checkpoint_url, self.world, self.config.keep)
        self.step = 0
        self.seconds = 0.0
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.sample_order = ""
        self.skipped = SkippedSteps(self.config.max_skipped_steps)
        self._stall = 0.0
        self._stop = self._warned = self._closed = False
        self._ask_every = 1  # steps; known better after the first report
        self._watch: Watching | None = None
        self._step_started = 0.0
        self._attached: dict[str, Stateful] = {}
        self._saved = self.store.latest()
        self._resume(self._saved)
        self.resumed_from = self.step
        self.reporter: Reporter = context.open_reporter(self.step)
        # In fp16 the loss scale is found by gradients that overflow now and then; such a step changes nothing.
        self._window = _Window(checks_norms=self.config.precision != "fp16")
        self._peak_flops = peak_flops(self.world.device, self.config.precision)
        if self._peak_flops:
            self._work = estimate(context.stage, self.config, context.model, self.world.size)

    def _resume(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.engine != self.engine.name:
            raise UserError(
                f"{self.store.url} was written by the {saved.engine} engine and this run uses {self.engine.name}; "
                "train the way it was started, or choose another run folder"
            )
        stored = self.context.completed(saved.state["fingerprint"])
        if stored != self.context.fingerprint():
            raise UserError(
                f"{self.store.url} belongs to another run: {self.context.difference(stored)}; choose another run folder"
            )
        self.engine.load(saved.folder, saved.world_size)
        self.loader.load_state_dict(saved.state["loader"])
        self.step, self.seconds = saved.step, float(saved.state["seconds"])
        self.first, self.last = dict(saved.state["first"]), dict(saved.state["last"])
        self.sample_order = saved.state["sample_order"]
        self.skipped.faults = [(int(step), list(ids)) for step, ids in saved.state.get("skipped", [])]
        if self.world.is_main:
            _log.info("continuing %s after step %d", self.context.stage, self.step)
            if words := prolonged(self.config, self.step, saved.state.get("steps", self.config.steps)):
                _log.info("%s: %s", self.context.stage, words)

    def attach(self, name: str, part: Stateful) -> None:
        """Store another part with the checkpoints (the same on every worker), and continue it where it was."""
        self._attached[name] = part
        if self._saved is not None:
            file = self._saved.folder / f"{name}.pt"
            part.load_state_dict(torch.load(file, map_location=self.world.device, weights_only=True))

    def watch(self, watch: Watching) -> None:
        """Measure and write what `watch` says after its steps, and continue it where it was."""
        self._watch = watch
        watch.go_on({} if self._saved is None else self._saved.state.get("watch", {}), self.step)

    def _goes_on(self) -> bool:
        return self.step < self.config.steps and not (self._watch is not None and self._watch.over)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        config = self.config
        batches = iter(self.loader) if self._goes_on() else iter(())
        progress, completed = self._progress(), False
        profiler: StepProfiler | None = None
        try:
            if self.context.profile and self.world.is_main:
                profiler = StepProfiler(self.context.profile, self.step + 1, self.context.run_dir, self.world)
            while self._goes_on():
                started = self._step_started = time.perf_counter()
                batch = next(batches)
                self._window.start_step(self.step + 1, time.perf_counter() - started, batch.ids)
                self.step += 1
                # Whatever draws from torch's own generator (dropout) repeats after a restart.
                torch.manual_seed(generator_for(config.seed, "torch", self.step, self.world.rank).initial_seed())
                yield self.step, batch
                self.seconds += time.perf_counter() - started
                if profiler is not None:
                    profiler.end_step()
                if progress is not None:
                    progress.update(1, self._note())
                if self._stop:
                    self.close()
                    raise Stopped(f"{self.context.stage} stopped at step {self.step}; run again to continue")
            completed = True
        finally:
            if profiler is not None:
                profiler.close()
            if progress is not None:
                progress.close()
            if not completed and not self._closed:
                self._abandon()

    def micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        """This worker's batch in `accumulation` parts, moved to the device; pixels become floats in [-1, 1]."""
        share = len(batch.ids)
        size = share // self.accumulation
        for start in range(0, share, size):
            yield placed(batch, slice(start, start + size), self.world.rank * share + start, self.world.device)

    def backward(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Add one micro-batch: its gradient, and its loss terms for the figures."""
        self.engine.backward(loss)
        self._window.add({"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}}, 1.0 / self.accumulation)

    def end_step(self) -> None:
        """Update the weights; report, check and save when it is time."""
        config, step = self.config, self.step
        self._window.lr = lr_at(step, config)
        self._window.end_step(self.engine.step(step, self._window.lr))
        save = step % config.checkpoint_every == 0 or step == config.steps
        stop = self._question() if step % self._ask_every == 0 else Stop.NO
        save = save or stop is Stop.LEAVE or (stop is Stop.SAVE and not self._warned)
        watch = self._watch
        if save or step % config.log_every == 0 or (watch is not None and watch.due(step)):
            self._report()  # it finds a loss that is not finite, or too many gradients: such weights are not saved
        if save or (watch is not None and watch.over):
            self.save()
        self._warned = self._warned or stop is Stop.SAVE
        self._stop = stop is Stop.LEAVE and step < config.steps

    def grid_due(self) -> bool:
        """Whether this step ends with an image grid."""
        every = self.config.grid_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    def first_grid_due(self) -> bool:
        """Whether a run begins, with an image grid of what it starts from. A run that continues has that already."""
        return self.step == 0 and bool(self.config.grid_every)

    def save(self) -> None:
        """Start writing a checkpoint of this step."""
        started = time.perf_counter()
        self.store.wait()  # the last checkpoint's copies are written over now
        state = {
            "loader": self.loader.state_dict(),
            "seconds": self.seconds,
            "first": self.first,
            "last": self.last,
            "sample_order": self.sample_order,
            "skipped": list(self.skipped.faults),
            "fingerprint": {"config_version": CONFIG_VERSION, **self.context.fingerprint()},
            "as_begun": dict(self.context.as_begun),
            "steps": self.config.steps,
            "watch": {} if self._watch is None else self._watch.state_dict(),
        }
        snapshot = self.engine.snapshot()
        # The attached parts copy theirs now: they are small and change outside the engine's step.
        attached = (
            {f"{name}.pt": part.state_dict() for name, part in self._attached.items()} if self.world.is_main else {}
        )

        def files() -> dict[str, Any]:
            copied = {**snapshot.files(), **attached}
            self._close_watch()  # bundles and averages that this checkpoint knows of come before it, or are made anew
            return copied

        self.store.save(self.step, self.engine.name, files, state)
        self._stall += time.perf_counter() - started

    @property
    def stall(self) -> float:
        """Seconds that training has stood still for checkpoints."""
        return self._stall + self.engine.stall

    def close(self) -> None:
        """Finish writing; give back the loader and the reporter."""
        self._closed = True
        self._close_watch()
        self.store.close()
        self.loader.close()
        self.reporter.close()

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _abandon(self) -> None:
        """After an error: let what is being written end, and hide whatever goes wrong on the way."""
        self._closed = True
        for close in (self._close_watch, self.store.close, self.loader.close, self.reporter.close):
            with contextlib.suppress(Exception):
                close()

    def _question(self) -> Stop:
        """The firmest of what the workers are asked. All ask at the same step: it may be a round trip among them."""
        asked = self.context.stop_requested()
        wishes = torch.tensor([asked is Stop.SAVE, asked is Stop.LEAVE], dtype=torch.float64)
        save, leave = (self.world.mean(wishes) > 0).tolist()
        return Stop.LEAVE if leave else Stop.SAVE if save else Stop.NO

    def _report(self) -> None:
        """Figures of the steps since the last report, averaged over the workers."""
        window = self._window
        local = window.values()
        skipped, broken = window.faults()
        local |= {"step_seconds": window.elapsed() / len(window.steps)}
        local |= {"num_skipped": float(len(skipped)), "num_broken": float(len(broken))}
        names = sorted(local)
        mean = self.world.mean(torch.tensor([local[name] for name in names], dtype=torch.float64))
        values = dict(zip(names, mean.tolist()))
        self._ask_every = max(1, int(_ASK_SECONDS / max(values.pop("step_seconds"), 1e-9)))
        num_skipped, num_broken = values.pop("num_skipped"), values.pop("num_broken")
        if num_broken > 0 or not all(math.isfinite(values[name]) for name in window.sums):
            self._fail_not_finite(merged(self.world.gather(broken)))
        if num_skipped > 0:
            self.skipped.add(self.context.stage, merged(self.world.gather(skipped)), log=self.world.is_main)
            if self.skipped.is_over:
                self._fail_not_finite(self.skipped.faults[-1:])
        if num_skipped == len(window.steps):  # no step counted
            values = {name: value for name, value in values.items() if name not in window.sums}
        values.update(self._rates(window))
        if self._watch is not None and self._watch.due(self.step):
            values.update(self._watch.after(self.step))
        values.update(self._validate_percent())
        if self.skipped.faults:
            values["skipped_steps"] = float(len(self.skipped.faults))
        if "loss" in values:
            self.first = self.first or values
        self.last = {**self.last, **values}
        for ids in zip(*self.world.gather(window.ids)):
            self.sample_order = _chain(self.sample_order, [i for share in ids for i in share])
        if self.world.is_main:
            self.reporter.metrics(self.step, values)
        window.clear()

    def _rates(self, window: _Window) -> dict[str, float]:
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

    def _validate_percent(self) -> dict[str, float]:
        """Share of the run so far that held-out figures and early bundles took."""
        if self._watch is None or not self._watch.seconds:
            return {}
        whole = self.seconds + time.perf_counter() - self._step_started
        return {"validate_percent": 100.0 * self._watch.seconds / max(whole, 1e-9)}

    def _fail_not_finite(self, faults: list[Fault]) -> None:
        step, ids = faults[0] if faults else (self.step, [])
        self.store.wait()  # a checkpoint may still be on its way to the store
        self.world.barrier()  # and is complete when the main worker has written its manifest
        steps = sorted(s for s, complete in self.store._steps().items() if complete)
        before = f"checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint had been written"
        name, number = f"{self.context.stage}.max_skipped_steps", len(self.skipped.faults)
        allowed, todo = "", "or look at these samples"
        if self.skipped.is_over:
            allowed = f"; {number} such steps are more than {name} = {self.skipped.budget}" if number > 1 else ""
            todo = f"look at these samples or allow more ({name})"
        raise UserError(
            f"{self.context.stage}: the loss or its gradient is not finite at step {step}; samples: {', '.join(ids)}"
            f"{allowed}; {before}. Lower the learning rate, use fp32, {todo}"
        )

    def _progress(self) -> Progress | None:
        if not self.world.is_main:
            return None
        return Progress(
            f"train {self.context.stage}",
            self.config.steps,
            "step",
            initial=self.step,
            stream=self.context.progress_stream,
        )

    def _note(self) -> str:
        if not self.last:
            return ""
        rate, wait = self.last["images_per_s"], self.last["data_wait_percent"]
        terms = " ".join(f"{k} {v:.4g}" for k, v in self.last.items() if k in self._window.names)
        note = f"{terms} · {rate:.1f} images/s · data-wait {wait:.1f}%"
        if "validate_percent" in self.last and self._watch is not None:
            note += f" · validate {self.last['validate_percent']:.1f}%{self._watch.note()}"
        return note


class _Window:
    """Figures collected since the last report. `checks_norms`: a step whose gradient is not finite was skipped, and
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


def placed(batch: Batch, part: slice, first: int, device: torch.device) -> MicroBatch:
    """Samples `part` of a batch on the device; the first of them is number `first` of all."""
    return MicroBatch(
        range(first, first + part.stop - part.start),
        _pixels(batch.pixels, part, device),
        _place(batch.latents, part, device),
        _place(batch.condition, part, device),
    )


def prolonged(config: StageConfig, step: int, before: int) -> str:
    """What it means for a run at `step` that it has another number of steps than `before`, in words; "" where it means
    nothing. A cosine goes on along the curve of the new number: the learning rate rises once, to where that curve is.
    """
    if config.steps == before or step >= config.steps:
        return ""
    words = f"{config.steps} steps in place of {before}"
    if config.schedule == "cosine":
        old = dataclasses.replace(config, steps=before)
        words += (
            f"; the learning rate goes on along the longer cosine: {lr_at(step, old):.3g} at step {step}, "
            f"{lr_at(step + 1, config):.3g} at the next"
        )
    return words


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the device for CUDA, of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def _chain(previous: str, ids: list[str]) -> str:
    return hashlib.sha256(" ".join([previous, *ids]).encode()).hexdigest()


def _pixels(pixels: Tensor | None, part: slice, device: torch.device) -> Tensor | None:
    if pixels is None:
        return None
    return _moved(pixels[part], device).float().div_(127.5).sub_(1.0)


def _place(tensor: Tensor | None, part: slice, device: torch.device) -> Tensor | None:
    return None if tensor is None else _moved(tensor[part], device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from page-locked memory, since a copy from other memory waits for the work before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
