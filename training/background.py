"""What a run writes meanwhile, behind the training: one thing after another, in a thread of the main worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger("latentzoom")


class BackgroundWriting:
    """What cannot be written is told in a warning: training goes on, and its checkpoints say themselves when a disk is
    full."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self, name: str, *writes: tuple[str, Callable[[], object]]) -> None:
        """Begin to write in a thread of this name, once what was begun before has ended. writes: URL, and what writes
        it; each is tried, whatever becomes of the others."""
        self.close()

        def work() -> None:
            for url, write in writes:
                try:
                    write()
                except Exception as error:
                    _log.warning("%s could not be written, training goes on: %s", url, error)

        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._thread = thread

    def close(self) -> None:
        """Wait for what is being written. In any thread."""
        thread = self._thread
        if thread is not None:
            thread.join()
