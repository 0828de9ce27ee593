"""What accompanies a stage's training: held-out figures, early figures of quality, the newest and the best bundle,
early stopping, and snapshots of power-function averages. All of it uses averaged weights and changes nothing that is
trained. What all workers decide they decide by the same numbers, so that nobody waits for one of them to say it.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from training.averaged import ready
from training.context import Context
from training.engine import Engine
from training.held_out import SPLIT, HeldOut, StageFigures
from training.newest import RunningBundles
from training.power_snapshots import PowerSnapshots
from training.quality import PREFIX as QUALITY
from training.quality import Quality, measure_quality

VALIDATION = "val/"
_HIGHER = ("psnr", "ssim", "precision", "recall", "density", "coverage", "selfssim")
_log = logging.getLogger("latentzoom")


def higher_is_better(figure: str) -> bool:
    """By a figure's name: "val/psnr_x64" yes, "val/loss" and "quality/kid_x256" no."""
    return figure.partition("/")[2].removeprefix("teacher_").startswith(_HIGHER)


class Watch:
    """See `training.session.Watching`. `best`: figure, value and step of the best bundle so far."""

    def __init__(self, context: Context, engine: Engine, figures: StageFigures) -> None:
        self.context, self.engine, self.figures = context, engine, figures
        self.config = config = context.config
        self.best_by = config.best_by or VALIDATION + figures.best_by
        self.seconds, self.over = 0.0, False
        self.best: dict[str, Any] | None = None
        self._stale = 0
        self._newest: dict[str, float] = {}
        self._network: nn.Module | None = None
        self._held_out = HeldOut(context, figures)
        self._quality = self._open_quality()
        self._bundles = RunningBundles(context)
        self._snapshots = PowerSnapshots(context)
        self._check()

    def _open_quality(self) -> Quality | None:
        if not self.config.quality_every or not self.context.manifest.splits.get(SPLIT):
            return None
        make_quality = self.context.request.make_quality
        return make_quality(self.context) if make_quality is not None else None

    def _check(self) -> None:
        """Say what will not be measured; `UserError` for a figure that there is not."""
        config, context, words = self.config, self.context, ""
        if (config.validate_every or config.quality_every) and not context.manifest.splits.get(SPLIT):
            words = (
                f"no validation, since {context.data} has no split {SPLIT!r}; hold images out with --val-fraction 0.02"
            )
        elif config.quality_every and self._quality is None:
            words = "no early figures of quality: no evaluation fits what there is at this stage"
            if context.request.make_quality is None:
                words = "no early figures of quality: they come with `latentzoom train`, with or without --local"
            if self.best_by.startswith(QUALITY):
                raise UserError(f"{context.stage}.best_by = {self.best_by!r}: {words}; choose one of `val/...`")
        if words and context.world.is_main:
            _log.info("%s: %s", context.stage, words)
        names = [VALIDATION + name for name in self.figures.names] if self._held_out.num else []
        names += [QUALITY + name for name in self._quality.names] if self._quality is not None else []
        if names and self.best_by not in names:
            self._no_such_figure(names)

    def _no_such_figure(self, names: list[str]) -> None:
        raise UserError(
            f"{self.context.stage}.best_by = {self.best_by!r} is no figure of this stage; use one of {', '.join(names)}"
        )

    # --- after a step -------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        return self._validates(step) or self._evaluates(step) or self._saves(step) or self._snapshots.due(step)

    def _validates(self, step: int) -> bool:
        return bool(self._held_out.num) and self._is_time(step, self.config.validate_every)

    def _evaluates(self, step: int) -> bool:
        return self._quality is not None and self._is_time(step, self.config.quality_every)

    def _saves(self, step: int) -> bool:
        every = self.config.bundle_every
        return bool(every) and step % every == 0 and step < self.config.steps

    def _is_time(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.config.steps)

    def after(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        values: dict[str, float] = {}
        if self._validates(step) or self._evaluates(step):
            network = self._averaged_network()
            if self._validates(step):
                values |= {VALIDATION + name: value for name, value in self._validate(network).items()}
            if self._evaluates(step):
                assert self._quality is not None
                values |= measure_quality(self._quality, self.figures.whole(network), self.context.world)
            self._newest = values
        is_better = self._judge(step, values)
        if is_better or self._saves(step):
            weights = self.engine.averaged()  # collective
            if weights is not None:
                own = {name: tensor.clone() for name, tensor in weights.items()}  # on a CPU: the average itself
                self._bundles.write(own, step, newest=self._saves(step), best=self.best if is_better else None)
        if self._snapshots.due(step):
            self._snapshots.write(self.engine, step)
        self.seconds += time.perf_counter() - started
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _averaged_network(self) -> nn.Module:
        """The stage's network with the averaged weights, on every worker. Collective."""
        if self._network is None:
            network = ready(self.figures.build(), self.context)
            if self.config.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._network = network
        self.engine.average_into(dict(self._network.named_parameters()))
        return self._network

    @torch.no_grad()
    def _validate(self, network: nn.Module) -> dict[str, float]:
        """The mean over the held-out samples of each figure: one reduction of all values, each at its sample's place,
        so that the order of the sum does not depend on the workers. Collective."""
        device, names = self.context.world.device, self.figures.names
        table = torch.zeros(self._held_out.num, len(names), dtype=torch.float64, device=device)
        for micro in self._held_out:
            values = self.figures.measure(network, micro)
            columns: list[Tensor] = [values[name].to(device, torch.float64) for name in names]
            table[micro.index.start : micro.index.stop] = torch.stack(columns, dim=1)
        rows = self.context.world.sum(table).T.tolist()
        return {name: _mean(row) for name, row in zip(names, rows)}

    def _judge(self, step: int, values: dict[str, float]) -> bool:
        """Whether these figures are the best so far; counts those that are not, to stop early."""
        is_quality = self.best_by.startswith(QUALITY)
        if not (self._evaluates(step) if is_quality else self._validates(step)):
            return False
        if self.best_by not in values:
            self._no_such_figure(sorted(values))
        value = values[self.best_by]
        best = None if self.best is None else float(self.best["value"])
        sign = 1.0 if higher_is_better(self.best_by) else -1.0
        if math.isfinite(value) and (best is None or sign * value > sign * best):
            self.best, self._stale = {"figure": self.best_by, "value": value, "step": step}, 0
            return True
        self._stale += 1
        self._end_early(step)
        return False

    def _end_early(self, step: int) -> None:
        patience = self.config.early_stop_patience
        self.over = bool(patience) and self._stale >= patience
        if self.over and self.context.world.is_main and step < self.config.steps:
            best = "" if self.best is None else f"; the best was {self.best['value']:.5g} at step {self.best['step']}"
            _log.info(
                "%s ends early at step %d: %s has not become better in %d validations%s",
                self.context.stage, step, self.best_by, self._stale, best,
            )  # fmt: skip

    def note(self) -> str:
        value = self._newest.get(self.best_by)
        return "" if value is None else f" · {self.best_by} {value:.4g}"

    # --- state --------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What figures must have in common to be compared."""
        num = self._quality.num if self.best_by.startswith(QUALITY) and self._quality else self._held_out.num
        return {"best_by": self.best_by, "num": num}

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "best": self.best, "stale": self._stale, "seconds": self.seconds}

    def go_on(self, state: dict[str, Any], step: int) -> None:
        """Figures of other samples, or another figure, begin anew. A checkpoint from before has none."""
        self.seconds = float(state.get("seconds", 0.0))
        if state and all(state.get(name) == value for name, value in self._identity().items()):
            self.best, self._stale = state["best"], int(state["stale"])
            self.over = 0 < self.config.early_stop_patience <= self._stale
            if self.over and self.context.world.is_main and step < self.config.steps:
                _log.info(
                    "%s ended early at step %d and does not go on: early_stop_patience = %d; raise it, or set it to 0",
                    self.context.stage, step, self.config.early_stop_patience,
                )  # fmt: skip
        self._snapshots.go_on(self.engine, step)

    def close(self) -> None:
        self._bundles.close()
        self._snapshots.close()


def _mean(values: list[float]) -> float:
    """Rounded once, so that it is the same on every processor."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
