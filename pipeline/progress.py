"""Progress of long operations: rate and ETA, a moving bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO


def format_seconds(seconds: float) -> str:
    """12.3 → "12s", 75 → "1m15s", 7325 → "2h02m"."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts `done` of `total` units; prints at most every `interval` seconds, and once at the end.

    `total` may be None when unknown. `initial` units were done by an earlier run and do not count for the rate.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "it",
        *,
        initial: int = 0,
        interval: float = 5.0,
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.initial, self.done = initial, initial
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.interval = 0.2 if self.is_terminal else interval
        self.start = time.monotonic()
        self.last_print = 0.0
        self.note = ""

    def update(self, num: int = 1, note: str = "") -> None:
        """Advance by `num` units. `note` (for example "loss 0.123") stays until the next one."""
        self.done += num
        if note:
            self.note = note
        now = time.monotonic()
        if now - self.last_print >= self.interval:
            self.last_print = now
            self._print()

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.initial) / elapsed
        parts = [self.label]
        if self.total is not None:
            percent = 100.0 * self.done / max(self.total, 1)
            parts.append(f"{self.done}/{self.total} ({percent:.0f}%)")
        else:
            parts.append(f"{self.done}")
        parts.append(f"{rate:.1f} {self.unit}/s" if rate >= 0.1 or rate == 0 else f"{1 / rate:.1f} s/{self.unit}")
        if self.total is not None and rate > 0:
            parts.append(f"ETA {format_seconds((self.total - self.done) / rate)}")
        if self.note:
            parts.append(self.note)
        return "  ".join(parts)

    def _print(self) -> None:
        if self.is_terminal:
            self.stream.write("\r\x1b[K" + self.line())
        else:
            self.stream.write(self.line() + "\n")
        self.stream.flush()

    def close(self) -> None:
        self._print()
        if self.is_terminal:
            self.stream.write("\n")
            self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
