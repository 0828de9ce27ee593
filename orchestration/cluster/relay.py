"""Lines from the main worker to the terminal of whoever started the run, and its wish to stop to the workers, through
Ray's key-value store.

Ray's own forwarding prints every process's output with prefixes, most of it Ray talking about itself. Here only what
the training code says arrives, as it said it. Losing a line is harmless: nothing here may disturb training.
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import sys
import threading
import uuid
from types import TracebackType
from typing import TextIO

from ray.experimental import internal_kv

from pipeline.progress import LINE_START, log_format, shortened, terminal_columns
from pipeline.redact import clean

_NAMESPACE = b"latentzoom"
_POLL_SECONDS = 0.25


class RelayStream(io.TextIOBase):
    """The worker's side: a text stream whose flushes arrive at the other side, which is a terminal or not."""

    columns = 1 << 16
    """A progress line is cut where it is shown, to the width that the terminal has there."""

    def __init__(self, channel: str, is_terminal: bool) -> None:
        self.channel, self.is_terminal = channel, is_terminal
        self._start = uuid.uuid4().hex[:8]
        self._num, self._text = 0, ""

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self._text += text
        return len(text)

    def flush(self) -> None:
        if not self._text:
            return
        text, self._text = clean(self._text), ""
        key = f"{self.channel}/{self._start}/{self._num:08d}".encode()
        self._num += 1
        with contextlib.suppress(Exception):
            internal_kv._internal_kv_put(key, text.encode(), namespace=_NAMESPACE)

    def logging_handler(self) -> logging.Handler:
        """A handler that sends log records here."""
        handler = logging.StreamHandler(self)
        handler.setFormatter(logging.Formatter(log_format(self)))
        return handler

    def was_asked_to_stop(self) -> bool:
        """Whether the other side called `ask_to_stop`. The channel's end, or Ray's, is no such wish."""
        with contextlib.suppress(Exception):
            return bool(internal_kv._internal_kv_exists(_stop_key(self.channel), namespace=_NAMESPACE))
        return False


class Relay:
    """The driver's side: prints what arrives on `channel` while the block runs, and can ask the workers to stop."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.channel = f"lines/{uuid.uuid4().hex}"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=5.0)

    def ask_to_stop(self) -> bool:
        """Every worker that looks sees it. False: Ray is not there any more."""
        if not is_ray_there():
            return False
        internal_kv._internal_kv_put(_stop_key(self.channel), b"1", namespace=_NAMESPACE)
        return True

    def _run(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self._print()
        self._print()

    def _print(self) -> None:
        with contextlib.suppress(Exception):
            for key in sorted(internal_kv._internal_kv_list(self.channel.encode(), namespace=_NAMESPACE)):
                text = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
                internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
                if text:
                    self.stream.write(self._fitted(text.decode()))
                    self.stream.flush()

    def _fitted(self, text: str) -> str:
        """A progress line, which has no end, as wide as the terminal is now; other text as it is."""
        before, start, line = text.rpartition(LINE_START)
        if not start or "\n" in line:
            return text
        return f"{before}{start}{shortened(line, terminal_columns(self.stream) - 1)}"


def is_ray_there() -> bool:
    """Whether Ray's control service can be reached; asking it where it cannot would wait for a minute."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError:
        return False
    return True


def _stop_key(channel: str) -> bytes:
    return f"stop/{channel}".encode()
