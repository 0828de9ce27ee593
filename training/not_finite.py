"""Steps whose gradient is not a number: they change nothing, are counted, and end the run only beyond a budget.

Whether a step counts follows from the global gradient norm, which is the same on every worker, and is decided on the
device (`skip_unless_finite`): nobody waits for it before the next report. In fp16 such steps are the loss scaler's,
which finds its scale by them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError

_log = logging.getLogger("latentzoom")
Fault = tuple[int, list[str]]
"""An optimizer step and the ids of its samples."""


@dataclass(frozen=True)
class Report:
    """What one worker knows of such a step: its share of the samples, and whether their own loss is not finite."""

    step: int
    ids: list[str]
    has_bad_loss: bool


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Let the next step of a fused optimizer leave weights, moments and its own count as they are where the gradient's
    global norm (a scalar on the device) is not finite: torch's `found_inf`, as its loss scaler sets it. On devices
    without fused optimizers such a step is one with a gradient of zero."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        return
    is_finite = norm.isfinite()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = torch.where(is_finite, parameter.grad, torch.zeros_like(parameter.grad))


class SkippedSteps:
    """Those of a run so far, with their samples; `budget` are allowed."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.faults: list[Fault] = []

    def add(self, stage: str, faults: list[Fault], *, log: bool) -> None:
        """Count further ones. log: say so, step by step (the main worker)."""
        for step, ids in faults:
            self.faults.append((step, ids))
            if log and not self.is_over:
                _log.warning(
                    "%s: step %d is skipped, its gradient is not finite (%d of at most %d such steps); samples: %s",
                    stage,
                    step,
                    len(self.faults),
                    self.budget,
                    ", ".join(ids),
                )

    @property
    def is_over(self) -> bool:
        """Whether there are more than the budget allows."""
        return len(self.faults) > self.budget

    def error(self, stage: str, fault: Fault, kept: int | None) -> UserError:
        """What ends a run: the fault, and what to do about it. kept: step of the newest checkpoint."""
        step, ids = fault
        before = "no checkpoint had been written" if kept is None else f"checkpoint of step {kept} is kept"
        name, number = f"{stage}.max_skipped_steps", len(self.faults)
        allowed, todo = "", "or look at these samples"
        if self.is_over:
            allowed = f"; {number} such steps are more than {name} = {self.budget}" if number > 1 else ""
            todo = f"look at these samples or allow more ({name})"
        return UserError(
            f"{stage}: the loss or its gradient is not finite at step {step}; samples: {', '.join(ids)}"
            f"{allowed}; {before}. Lower the learning rate, use fp32, {todo}"
        )


def merged(reports: list[list[Report]]) -> list[Fault]:
    """The workers' reports of the same steps as one, by step. The samples are those of the shares whose own loss is not
    finite, or all of the step where no loss tells."""
    steps: dict[int, list[Report]] = {}
    for report in (one for worker in reports for one in worker):
        steps.setdefault(report.step, []).append(report)
    faults = []
    for step, shares in sorted(steps.items()):
        told = [share for share in shares if share.has_bad_loss] or shares
        faults.append((step, [sample for share in told for sample in share.ids]))
    return faults
