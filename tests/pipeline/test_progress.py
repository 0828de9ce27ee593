"""The progress line: one line in a terminal of any width, plain lines in a log."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import re
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from pipeline.progress import Progress, log_format, shortened

NOTE = "loss 0.1234 kl 5.678 psnr 23.45 · 1234.5 images/s · data-wait 0.1%"


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    """A terminal of 40 columns: what is written to, and what shows it."""
    shown, written = os.openpty()
    fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(written, "w") as stream:
        yield stream, shown
    os.close(shown)


def test_a_narrow_terminal_gets_one_line(terminal: tuple[TextIO, int]) -> None:
    stream, shown = terminal
    progress = Progress("train denoiser", 100000, "step", stream=stream)
    progress.interval = 0.0
    for _ in range(3):
        progress.update(1, NOTE)
    fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))  # it is made wider
    progress.update(1)
    progress.close()
    text = ""
    while "\n" not in text:
        text += os.read(shown, 1 << 16).decode()
    *narrow, wide, last = re.split(r"\r\x1b\[K", text)[1:]
    assert len(narrow) == 3 and all(36 < len(line) < 40 and line[-1] == "…" for line in narrow)
    assert narrow[0].startswith("train denoiser  1/100000 (0%)") and wide.endswith(NOTE)
    assert text.count("\n") == 1 and last.strip().endswith(NOTE)


def test_a_line_of_the_log_has_a_line_of_its_own(terminal: tuple[TextIO, int]) -> None:
    stream, shown = terminal
    handler, plain = logging.StreamHandler(stream), logging.StreamHandler(log := io.StringIO())
    with Progress("train denoiser", 3, "step", stream=stream) as progress:
        progress.interval = 0.0
        progress.update(1)
        for each in (handler, plain):
            each.setFormatter(logging.Formatter(log_format(each.stream)))
            each.handle(logging.makeLogRecord({"msg": "step 2 is skipped"}))
        progress.update(1)
    text = ""
    while text.count("\n") < 2:
        text += os.read(shown, 1 << 16).decode()
    first, told, second, last = re.split(r"\r\x1b\[K", text)[1:]  # the screen shows what follows the last of a line's
    assert "1/3" in first and told == "step 2 is skipped\r\n" and "2/3" in second and last.endswith("\r\n")
    assert log.getvalue() == "step 2 is skipped\n" and log_format(None) == "%(message)s"


def test_a_log_gets_plain_lines() -> None:
    log = io.StringIO()
    with Progress("train denoiser", 3, "step", stream=log, interval=0.0) as progress:
        for _ in range(3):
            progress.update(1, f"{NOTE}\nand more")
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and all(line.endswith(f"{NOTE} and more") for line in lines)
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue()


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        ("abcdef", 6, "abcdef"), ("abcdef", 5, "abcd…"), ("ab cdef", 4, "ab…"), ("写真写真", 6, "写真…"),
        ("写真", 1, "…"), ("abc", 0, ""),
    ],
)  # fmt: skip
def test_what_is_cut(text: str, columns: int, expected: str) -> None:
    assert shortened(text, columns) == expected
