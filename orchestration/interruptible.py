"""A command that is asked to end says what is kept and leaves nothing half-written, however it was asked."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGTERM (a scheduler, `kill`) and SIGHUP (a terminal that goes away) act as Ctrl-C does. Who set
    them otherwise, as `nohup` does, or what listens itself, as training does, is left in peace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [kind for kind in kinds if signal.getsignal(kind) is signal.SIG_DFL]
    for kind in taken:
        signal.signal(kind, _interrupt)
    try:
        yield
    finally:
        for kind in taken:
            signal.signal(kind, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # once more ends it at once
    raise KeyboardInterrupt
