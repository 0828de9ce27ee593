"""Runs a chain from its first open step: Ray where a step needs it, the run in MLflow closed as it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from orchestration.chain.steps import UNFINISHED, Result, Status, Step, run_steps, statuses
from orchestration.chain.work import parent_run
from orchestration.tracking import store as tracking
from orchestration.tracking.outages import patiently
from pipeline.errors import Stopped, UserError
from pipeline.progress import format_seconds
from training.config import STAGES

if TYPE_CHECKING:
    from orchestration.chain.job import Chain

Announce = Callable[[Status, int, int], None]
"""A step's status, its number from 1, and how many there are."""


def run_chain(chain: Chain, steps: Sequence[Step], *, announce: Announce, retries: int = 0) -> dict[str, Result]:
    """The results of `steps`, by name; finished ones are not run again. A Ray that is started for them is stopped.

    steps: those of the chain, or some of them with others of the caller's own. retries: as for `run_steps`. Whatever a
    step raises is raised, after the parent run was closed as KILLED or FAILED.
    """
    job = chain.job
    open_steps = {s.name for s in statuses(job.work, steps) if s.state != "done"}
    uses_ray = bool(set(STAGES) & open_steps) or job.preprocess.workers or job.evaluate_workers
    started = False
    try:
        if open_steps and uses_ray and not job.local:
            from orchestration.cluster.ray_train import start_ray

            started = start_ray()
        results = run_steps(job.work, steps, announce=announce, retries=retries, check=chain.still_ours)
    except BaseException as error:
        with contextlib.suppress(UserError):  # the first error is the one to show
            was_stopped = isinstance(error, (KeyboardInterrupt, Stopped))
            tracking.end_run(job.tracking_uri, parent_run(chain), "KILLED" if was_stopped else "FAILED")
        raise
    finally:
        if started:
            import ray

            ray.shutdown()
    if open_steps:
        patiently(lambda: tracking.end_run(job.tracking_uri, parent_run(chain)), "pipeline")
    return results


def announcer(start: float, title: str = "step") -> Announce:
    """Prints a line for every step: the clock since `start` (`time.monotonic`), its number, its name, why it runs."""

    def announce(status: Status, index: int, num: int) -> None:
        clock = format_seconds(time.monotonic() - start)
        state = "done before" if status.state == "done" else f"{status.state}: {status.reason}"
        state = "..." if status.reason == UNFINISHED else state
        print(f"[{clock:>6}] {title} {index}/{num} {status.name}: {state}", flush=True)

    return announce
