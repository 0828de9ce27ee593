"""What every stage's loop does besides its loss: batches, optimizer steps, figures, checkpoints, and stopping.

A stage reads:  for micro in session.micro_batches(...): session.backward(loss, terms)  …  session.end_step().
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

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
from training.figures import Figures
from training.micro_batch import MicroBatch, placed
from training.not_finite import Fault
from training.optim import generator_for, lr_at, prolonged
from training.profiling import StepProfiler
from training.reporter import Reporter
from training.result import Trained, TrainResult
from training.stopping import StopVotes

_log = logging.getLogger("latentzoom")


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


class Session:
    """One run of one stage on one worker, from where the last one stopped. Iterating yields (step, batch)."""

    def __init__(self, context: Context, engine: Engine, loader: Batches) -> None:
        self.context, self.engine, self.loader = context, engine, loader
        self.config: StageConfig = context.config
        self.world = context.world
        self.accumulation = accumulation_steps(self.config, self.world.size)
        self.store = CheckpointStore(context.checkpoint_url, self.world, self.config.keep)
        self.step = 0
        self._votes = StopVotes(context.request.stop_requested, self.world)
        self._watch: Watching | None = None
        self._stall = 0.0
        self._attached: dict[str, Stateful] = {}
        self._saved = self.store.latest()
        self.figures = Figures(context)
        self._resume(self._saved)
        self.resumed_from = self.step
        self.reporter: Reporter = context.open_reporter(self.step)

    def _resume(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.engine != self.engine.name:
            raise UserError(
                f"{self.store.url} was written by the {saved.engine} engine and this run uses {self.engine.name}; "
                "train the way it was started, or choose another run folder"
            )
        identity = self.context.identity
        if difference := identity.difference(identity.completed(saved.state["fingerprint"], self.store.url)):
            raise UserError(f"{self.store.url} belongs to another run: {difference}; choose another run folder")
        self.engine.load(saved.folder, saved.world_size)
        self.loader.load_state_dict(saved.state["loader"])
        self.figures.load_state_dict(saved.state)
        self.step = saved.step
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
        progress, is_over = self._progress(), False
        profiler: StepProfiler | None = None
        try:
            if self.context.request.profile and self.world.is_main:
                profiler = StepProfiler(self.context.request.profile, self.step + 1, self.context.run_dir, self.world)
            while self._goes_on():
                self.figures.start_waiting()
                batch = next(batches)
                self.figures.start_step(self.step + 1, batch.ids)
                self.step += 1
                # Whatever draws from torch's own generator (dropout) repeats after a restart.
                torch.manual_seed(generator_for(config.seed, "torch", self.step, self.world.rank).initial_seed())
                yield self.step, batch
                self.figures.stop_clock()
                if profiler is not None:
                    profiler.end_step()
                if progress is not None:
                    progress.update(1, self._note())
                if self._votes.leaves and self.step < config.steps:
                    is_over = True
                    self.close()
                    raise Stopped(f"{self.context.stage} stopped at step {self.step}; run again to continue")
            is_over = True
        finally:
            if profiler is not None:
                profiler.close()
            if progress is not None:
                progress.close()
            if not is_over:
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
        self.figures.add({"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}}, 1.0 / self.accumulation)

    def end_step(self) -> None:
        """Update the weights; report, check and save when it is time."""
        config, step = self.config, self.step
        lr = lr_at(step, config)
        self.figures.end_step(self.engine.step(step, lr), lr)
        save = self._votes.wants_checkpoint(step) or step % config.checkpoint_every == 0 or step == config.steps
        watch = self._watch
        if save or step % config.log_every == 0 or (watch is not None and watch.due(step)):
            self._report()  # it finds a loss that is not finite, or too many gradients: such weights are not saved
        if save or (watch is not None and watch.over):
            self.save()

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
            **self.figures.state_dict(),
            "fingerprint": {"config_version": CONFIG_VERSION, **self.context.identity.fingerprint()},
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

    def finish(self, weights: dict[str, Tensor] | None) -> Trained:
        """End the run after its last step. weights: whole averaged weights by name on the main worker, else None."""
        self.close()
        figures = self.figures
        result = TrainResult(
            stage=self.context.stage,
            steps=self.step,
            resumed_from=self.resumed_from,
            seconds=figures.seconds,
            first_loss=figures.first.get("loss", math.nan),
            last_loss=figures.last.get("loss", math.nan),
            sample_order=figures.sample_order,
            metrics={**figures.last, "checkpoint_stall_s": self._stall + self.engine.stall},
        )
        return result, weights

    def close(self) -> None:
        """Finish writing; give back the loader and the reporter."""
        self._close_watch()
        self.store.close()
        self.loader.close()
        self.reporter.close()

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _abandon(self) -> None:
        """After an error: let what is being written end, and hide whatever goes wrong on the way."""
        for close in (self._close_watch, self.store.close, self.loader.close, self.reporter.close):
            with contextlib.suppress(Exception):
                close()

    def _report(self) -> None:
        """Figures of the steps since the last report, averaged over the workers."""
        summary = self.figures.summary()
        self._votes.set_pace(summary.step_seconds)
        if summary.fatal is not None:
            self._fail_not_finite(summary.fatal)
        values, watch = summary.values, self._watch
        if watch is not None and watch.due(self.step):
            values.update(watch.after(self.step))
        if watch is not None and watch.seconds:
            values["validate_percent"] = self.figures.percent_of_run(watch.seconds)
        values = self.figures.keep(values)
        if self.world.is_main:
            self.reporter.metrics(self.step, values)

    def _fail_not_finite(self, faults: list[Fault]) -> NoReturn:
        self.store.wait()  # a checkpoint may still be on its way to the store
        self.world.barrier()  # and is complete when the main worker has written its manifest
        fault = faults[0] if faults else (self.step, [])
        raise self.figures.skipped.error(self.context.stage, fault, self.store.newest_step())

    def _progress(self) -> Progress | None:
        if not self.world.is_main:
            return None
        return Progress(
            f"train {self.context.stage}",
            self.config.steps,
            "step",
            initial=self.step,
            stream=self.context.request.progress_stream,
        )

    def _note(self) -> str:
        note = self.figures.note()
        if "validate_percent" in self.figures.last and self._watch is not None:
            note += f" · validate {self.figures.last['validate_percent']:.1f}%{self._watch.note()}"
        return note
