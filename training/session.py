"""What every stage's loop does besides its loss: batches, optimizer steps, figures, checkpoints, and stopping.

A stage reads:  for micro in session.micro_batches(...): session.backward(loss, terms)  …  session.end_step().
"""

from __future__ import annotations

import contextlib
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
from pipeline.progress import Progress
from preprocess.sample import Batch
from training.checkpoint import CheckpointStore, Saved
from training.config import StageConfig
from training.context import Context
from training.engine import Engine, accumulation_steps
from training.estimate import estimate, peak_flops
from training.noise import Draws
from training.optim import generator_for, lr_at
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
        self._stall = 0.0
        self._stop = self._warned = self._closed = False
        self._ask_every = 1  # steps; known better after the first report
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
        if self.world.is_main:
            _log.info("continuing %s after step %d", self.context.stage, self.step)

    def attach(self, name: str, part: Stateful) -> None:
        """Store another part with the checkpoints (the same on every worker), and continue it where it was."""
        self._attached[name] = part
        if self._saved is not None:
            file = self._saved.folder / f"{name}.pt"
            part.load_state_dict(torch.load(file, map_location=self.world.device, weights_only=True))

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        config = self.config
        batches = iter(self.loader) if self.step < config.steps else iter(())
        progress, completed = self._progress(), False
        try:
            while self.step < config.steps:
                started = time.perf_counter()
                batch = next(batches)
                self._window.start_step(self.step + 1, time.perf_counter() - started, batch.ids)
                self.step += 1
                # Whatever draws from torch's own generator (dropout) repeats after a restart.
                torch.manual_seed(generator_for(config.seed, "torch", self.step, self.world.rank).initial_seed())
                yield self.step, batch
                self.seconds += time.perf_counter() - started
                if progress is not None:
                    progress.update(1, self._note())
                if self._stop:
                    self.close()
                    raise Stopped(f"{self.context.stage} stopped at step {self.step}; run again to continue")
            completed = True
        finally:
            if progress is not None:
                progress.close()
            if not completed and not self._closed:
                self._abandon()

    def micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        """This worker's batch in `accumulation` parts, moved to the device; pixels become floats in [-1, 1]."""
        share = len(batch.ids)
        size = share // self.accumulation
        for start in range(0, share, size):
            part = slice(start, start + size)
            first = self.world.rank * share + start
            yield MicroBatch(
                range(first, first + size),
                _pixels(batch.pixels, part, self.world.device),
                _place(batch.latents, part, self.world.device),
                _place(batch.condition, part, self.world.device),
            )

    def backward(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Add one micro-batch: its gradient, and its loss terms for the figures."""
        self.engine.backward(loss)
        self._window.add({"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}}, 1.0 / self.accumulation)

    def end_step(self) -> None:
        """Update the weights; report, check and save when it is time."""
        config, step = self.config, self.step
        self._window.lr = lr_at(step, config)
        self._window.norms.append(torch.as_tensor(self.engine.step(step, self._window.lr)))
        save = step % config.checkpoint_every == 0 or step == config.steps
        stop = self._question() if step % self._ask_every == 0 else Stop.NO
        save = save or stop is Stop.LEAVE or (stop is Stop.SAVE and not self._warned)
        if save or step % config.log_every == 0:
            self._report()  # it finds a loss that is not finite: such weights are not saved
        if save:
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
            "fingerprint": self.context.fingerprint(),
        }
        snapshot = self.engine.snapshot()
        # The attached parts copy theirs now: they are small and change outside the engine's step.
        attached = (
            {f"{name}.pt": part.state_dict() for name, part in self._attached.items()} if self.world.is_main else {}
        )
        self.store.save(self.step, self.engine.name, lambda: {**snapshot.files(), **attached}, state)
        self._stall += time.perf_counter() - started

    @property
    def stall(self) -> float:
        """Seconds that training has stood still for checkpoints."""
        return self._stall + self.engine.stall

    def close(self) -> None:
        """Finish writing; give back the loader and the reporter."""
        self._closed = True
        self.store.close()
        self.loader.close()
        self.reporter.close()

    def _abandon(self) -> None:
        """After an error: let what is being written end, and hide whatever goes wrong on the way."""
        self._closed = True
        for part in (self.store, self.loader, self.reporter):
            with contextlib.suppress(Exception):
                part.close()

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
        local["step_seconds"] = window.elapsed() / len(window.steps)
        local["bad"] = float(window.first_bad() is not None)
        names = sorted(local)
        mean = self.world.mean(torch.tensor([local[name] for name in names], dtype=torch.float64))
        values = dict(zip(names, mean.tolist()))
        self._ask_every = max(1, int(_ASK_SECONDS / max(values.pop("step_seconds"), 1e-9)))
        if values.pop("bad") > 0 or not all(math.isfinite(values[name]) for name in window.sums):
            self._fail_not_finite()
        values.update(self._rates(window))
        self.first = self.first or values
        self.last = values
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

    def _fail_not_finite(self) -> None:
        bad = self._window.first_bad()
        reports = [r for r in self.world.gather(bad) if r is not None]
        step, ids = min(reports) if reports else (self.step, [])
        for other_step, other_ids in reports:
            if other_step == step and other_ids is not ids:
                ids = sorted({*ids, *other_ids})
        self.store.wait()  # a checkpoint may still be on its way to the store
        steps = sorted(s for s, complete in self.store._steps().items() if complete)
        before = f"checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint had been written"
        raise UserError(
            f"{self.context.stage}: the loss or its gradient is not finite at step {step}; samples: {', '.join(ids)}; "
            f"{before}. Lower the learning rate, use fp32 or look at these samples"
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
        return f"{terms} · {rate:.1f} images/s · data-wait {wait:.1f}%"


class _Window:
    """Figures collected since the last report. `checks_norms`: a gradient that is not finite is an error too."""

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

    def start_step(self, step: int, waited: float, ids: list[str]) -> None:
        self.steps.append(step)
        self.ids.append(ids)
        self.waited += waited

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        for name, value in terms.items():
            value = value.double() * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if len(self.losses) < len(self.steps):
            self.losses.append(terms["loss"])
        else:
            self.losses[-1] = self.losses[-1] + terms["loss"]
        self.names.update(terms)

    def values(self) -> dict[str, float]:
        return {name: float(total) / len(self.steps) for name, total in self.sums.items()}

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def first_bad(self) -> tuple[int, list[str]] | None:
        # One wait for the device, not one a step.
        losses, norms = torch.stack(self.losses).tolist(), torch.stack(self.norms).tolist()
        for step, loss, norm, ids in zip(self.steps, losses, norms, self.ids):
            if not math.isfinite(loss) or (self.checks_norms and not math.isfinite(norm)):
                return step, ids
        return None


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
