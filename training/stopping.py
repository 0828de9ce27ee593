"""How a run is asked to stop, between two steps: by a signal, by a notice, or because its folder was taken over."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch

from training.world import World

ASK_SECONDS = 2.0
"""Seconds between two questions whether to stop, or one step where that takes longer."""
_TWICE_SECONDS = 1.0
"""`timeout` and some process managers send their signal to the process and again to its group."""


class Stop(enum.Enum):
    """What a run is asked to do. SAVE: write a checkpoint once and go on, the machine may be gone soon. LEAVE: write a
    checkpoint and raise `Stopped`."""

    NO = 0
    SAVE = 1
    LEAVE = 2


@contextlib.contextmanager
def stop_on_signals(still_ours: Callable[[], None] = lambda: None) -> Iterator[Callable[[], Stop]]:
    """Yields what a run asks: LEAVE after SIGTERM or Ctrl-C. A second signal acts at once, as if nobody listened.

    still_ours: called each time it is asked; raises when the run's folder was taken over by another job.
    Signals reach the main thread only; elsewhere they are left alone.
    """
    asked_at: float | None = None
    before = {}

    def notice(number: int, frame: object) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            # Not print: the signal may have interrupted one.
            os.write(2, b"\nlatentzoom: stopping after a checkpoint; once more stops at once\n")
        elif time.monotonic() - asked_at > _TWICE_SECONDS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
            signal.raise_signal(number)

    def asked() -> Stop:
        still_ours()
        return Stop.NO if asked_at is None else Stop.LEAVE

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, notice) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopVotes:
    """What the workers of a run agree on. requested: what this worker is asked. leaves: whether the run ends after this
    step."""

    def __init__(self, requested: Callable[[], Stop], world: World) -> None:
        self.leaves = False
        self._requested, self._world = requested, world
        self._every = 1  # steps; known better after the first report
        self._was_warned = False

    def set_pace(self, step_seconds: float) -> None:
        """How long a step takes, on every worker alike."""
        self._every = max(1, int(ASK_SECONDS / max(step_seconds, 1e-9)))

    def wants_checkpoint(self, step: int) -> bool:
        """Ask, where it is time, what to do after this step → whether a checkpoint is to be written: once for a notice,
        and before leaving. Collective."""
        vote = self._vote() if step % self._every == 0 else Stop.NO
        is_first_notice = vote is Stop.SAVE and not self._was_warned
        self._was_warned = self._was_warned or vote is Stop.SAVE
        self.leaves = vote is Stop.LEAVE
        return self.leaves or is_first_notice

    def _vote(self) -> Stop:
        """The firmest of what the workers are asked. All ask at the same step: it may be a round trip among them."""
        mine = self._requested()
        wishes = torch.tensor([mine is Stop.SAVE, mine is Stop.LEAVE], dtype=torch.float64)
        save, leave = (self._world.mean(wishes) > 0).tolist()
        return Stop.LEAVE if leave else Stop.SAVE if save else Stop.NO
