"""How a run is asked to stop, between two steps: by a signal, by a notice, or because its folder was taken over."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

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

    still_ours: called by each question; raises when the run's folder was taken over by another job.
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

    def question() -> Stop:
        still_ours()
        return Stop.NO if asked_at is None else Stop.LEAVE

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, notice) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield question
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
