"""Lines of a worker in the terminal of whoever started the run."""

import contextlib
import fcntl
import io
import logging
import os
import struct
import termios
from types import SimpleNamespace

import pytest

from orchestration.cluster import relay
from pipeline.progress import Progress


@pytest.fixture
def lines(monkeypatch):
    """Ray's key-value store, as a dictionary."""
    kept = {}
    monkeypatch.setattr(
        relay,
        "internal_kv",
        SimpleNamespace(
            _internal_kv_put=lambda key, value, namespace: kept.__setitem__(key, value),
            _internal_kv_get=lambda key, namespace: kept.get(key),
            _internal_kv_del=lambda key, namespace: kept.pop(key, None),
            _internal_kv_list=lambda prefix, namespace: [key for key in kept if key.startswith(prefix)],
        ),
    )
    return kept


def train(channel, *, is_terminal):
    """What a worker writes: two progress lines and, between them, one of the log."""
    stream = relay.RelayStream(channel, is_terminal)
    progress = Progress("train denoiser", 9, "step", stream=stream)
    progress.interval = 0.0
    progress.update(1, "loss 0.123 " * 20)
    stream.logging_handler().handle(logging.makeLogRecord({"msg": "a warning that is long " * 9}))
    progress.update(1)
    progress.close()


@pytest.mark.parametrize("columns", [40, 300])
def test_a_line_is_as_wide_as_the_terminal_where_it_is_shown(lines, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", "100")  # what a worker's own process believes
    shown, written = os.openpty()
    fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(written, "w") as terminal, relay.Relay(terminal) as sent:
        train(sent.channel, is_terminal=True)
    text = ""
    with contextlib.suppress(OSError):  # a terminal's end, once all is read: what was written comes in parts
        while part := os.read(shown, 1 << 16):
            text += part.decode()
    os.close(shown)
    first, told, second, last = text.split("\r\x1b[K")[1:]
    assert told == "a warning that is long " * 9 + "\r\n" and "2/9" in second and "2/9" in last and not lines
    assert [len(line) for line in (first, second)] == [39, 39] if columns == 40 else first.count("loss") == 20


def test_a_log_has_plain_lines(lines):
    log = io.StringIO()
    with relay.Relay(log) as sent:
        train(sent.channel, is_terminal=False)
    assert "\x1b" not in log.getvalue() and log.getvalue().count("\n") == 3
