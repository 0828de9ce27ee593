"""Progress of long operations: rate and ETA, a moving line on a terminal and plain lines elsewhere.

Not by rich's own progress: it says nothing in a log while it goes on, hides the cursor of a terminal that a kill then
leaves so, and has no line for the log of a Ray worker (`orchestration.cluster.relay`)."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import threading
import time
import unicodedata
from types import TracebackType
from typing import TextIO

from pipeline.common_options import now

LINE_START = "\r\x1b[K"
"""To the beginning of a terminal's line, which is cleared."""


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


def terminal_columns(stream: TextIO) -> int:
    """Width of the terminal behind a stream as it is now, or what the stream itself says (`columns`); of this process's
    own where it does not know."""
    if known := getattr(stream, "columns", 0):
        return int(known)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size().columns


def shortened(text: str, columns: int) -> str:
    """The beginning of a text that takes no more than so many columns (wide characters take two), with … for the rest:
    a longer line would be broken, and could not be written over."""
    if sum(map(_columns, text)) <= columns:
        return text
    taken, end = 1, 0
    while taken + _columns(text[end]) <= columns:
        taken += _columns(text[end])
        end += 1
    return (text[:end].rstrip() + "…")[: max(0, columns)]


def log_format(stream: TextIO | io.TextIOBase | None) -> str:
    """Of log lines on the stream where a `Progress` shows itself: on a terminal they take the place of its line, which
    comes back below them."""
    return f"{LINE_START}%(message)s" if stream is not None and stream.isatty() else "%(message)s"


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Notice:
    """A line on a terminal that is written when what it announces takes longer than a moment; not at all where it fails
    before. A log has no use for it."""

    def __init__(self, text: str, *, delay: float = 0.8, stream: TextIO | None = None) -> None:
        self._text, self._stream = text, stream or sys.stderr
        self._timer = threading.Timer(delay, self._say)
        self._timer.daemon = True

    def _say(self) -> None:
        with contextlib.suppress(AttributeError, OSError, ValueError):  # standard error may be closed, or None
            if self._stream.isatty() and not now().quiet:
                print(self._text, file=self._stream, flush=True)

    def over(self) -> None:
        """It is done."""
        self._timer.cancel()

    def __enter__(self) -> Notice:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over()


class Progress:
    """Counts `done` of `total` units; prints at most every `interval` seconds, and once at the end.

    `total` may be None when unknown. `initial` units were done by an earlier run and do not count for the rate. With
    `is_ticking` it shows itself at once, and goes on showing the time while a unit takes long.
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
        is_ticking: bool = False,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.initial, self.done = initial, initial
        self.stream = stream or (None if now().quiet else sys.stderr) or io.StringIO()
        self.is_terminal = self.stream.isatty()
        self.interval = 0.2 if self.is_terminal else interval
        self.start = time.monotonic()
        self.last_print = 0.0
        self.note = ""
        self._lock, self._end = threading.Lock(), threading.Event()
        self._shown: tuple[int, str] | None = None
        self._ticker: threading.Thread | None = None
        if is_ticking:
            self._tick()
            self._ticker = threading.Thread(target=self._keep_ticking, name="latentzoom-progress", daemon=True)
            self._ticker.start()

    def update(self, num: int = 1, note: str = "") -> None:
        """Advance by `num` units. `note` (for example "loss 0.123") stays until the next one."""
        self.done += num
        if note:
            self.note = note
        if time.monotonic() - self.last_print >= self.interval:
            self._tick()

    def _tick(self) -> None:
        self.last_print = time.monotonic()
        self._print()

    def _keep_ticking(self) -> None:
        interval = max(1.0, self.interval)
        while not self._end.wait(interval / 4):
            if time.monotonic() - self.last_print >= interval:
                self._tick()

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
        if rate == 0:
            parts[-1] = f"for {format_seconds(elapsed)}"
        elif self.total is not None:
            parts.append(f"ETA {format_seconds((self.total - self.done) / rate)}")
        if self.note:
            parts.append(self.note)
        return "  ".join(parts)

    def _print(self) -> None:
        line, self._shown = " ".join(self.line().splitlines()), (self.done, self.note)
        with self._lock, contextlib.suppress(ValueError, OSError):  # closed meanwhile, or a full disk
            if self.is_terminal:
                line = f"{LINE_START}{shortened(line, terminal_columns(self.stream) - 1)}"
            self.stream.write(line if self.is_terminal else f"{line}\n")
            self.stream.flush()

    def close(self) -> None:
        self._end.set()
        if self._ticker is not None:
            self._ticker.join()
        if self.is_terminal or self._shown != (self.done, self.note):
            self._print()
        if self.is_terminal:
            with contextlib.suppress(ValueError, OSError):
                self.stream.write("\n")
                self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
