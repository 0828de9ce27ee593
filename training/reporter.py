"""Where a run's figures go. Only the main worker reports, and from a background thread: reporting never delays a step,
and when it fails training goes on.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline import storage

_log = logging.getLogger("latentzoom")
_PUBLISH_SECONDS = 30.0
"""Seconds between two uploads of the lines to a remote run folder: a worker that is killed loses no more."""


class Reporter(Protocol):
    """A sink for figures and pictures, indexed by optimizer step."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Figures of one step."""

    def images(self, step: int, name: str, image: np.ndarray) -> None:
        """One picture, uint8 (H, W, 3)."""

    def params(self, values: dict[str, Any]) -> None:
        """Settings of the run."""

    def close(self) -> None:
        """Write what is left."""


class NullReporter:
    """Reports nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def images(self, step: int, name: str, image: np.ndarray) -> None: ...

    def params(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class FolderReporter:
    """`metrics.jsonl` (one JSON object a line) and `grids/{name}-{step}.png` in the run folder.

    After a restart, lines of steps that will be repeated are dropped, so every step is there once.
    """

    def __init__(self, run_dir: str, resume_step: int = 0) -> None:
        self.url, self._lines = storage.join(run_dir, "metrics.jsonl"), _kept_lines(run_dir, resume_step)
        self.grids = storage.join(run_dir, "grids")
        self._file, self._published = None, time.monotonic()
        if storage.is_local(run_dir):
            path = Path(storage.absolute(run_dir))
            path.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(self.url, "".join(self._lines).encode())
            self._file = open(path / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115

    def metrics(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is not None:
            self._file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._published >= _PUBLISH_SECONDS:
            self._publish()

    def images(self, step: int, name: str, image: np.ndarray) -> None:
        import io

        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        storage.write_bytes(storage.join(self.grids, f"{name}-{step:08d}.png"), buffer.getvalue())

    def params(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        else:
            self._publish()

    def _publish(self) -> None:
        storage.write_bytes(self.url, "".join(self._lines).encode())
        self._published = time.monotonic()


def read_figures(run_dir: str) -> list[dict[str, Any]]:
    """The lines of a run folder's `metrics.jsonl`: each has "step" and the figures. Empty where there is no file."""
    url = storage.join(run_dir, "metrics.jsonl")
    lines = storage.read_bytes(url).decode().splitlines() if storage.exists(url) else []
    figures = []
    for line in lines:
        try:
            figures.append({**(values := json.loads(line)), "step": int(values["step"])})
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be cut
    return figures


def _kept_lines(run_dir: str, resume_step: int) -> list[str]:
    if resume_step == 0:
        return []
    return [json.dumps(values) + "\n" for values in read_figures(run_dir) if values["step"] <= resume_step]


class BackgroundReporter:
    """Passes everything to several reporters from one thread. An error is logged once a reporter and never raised."""

    def __init__(self, reporters: list[Reporter]) -> None:
        self._reporters = reporters
        self._failed: set[int] = set()
        self._queue: queue.SimpleQueue[Callable[[Reporter], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._queue.put(lambda reporter: reporter.metrics(step, values))

    def images(self, step: int, name: str, image: np.ndarray) -> None:
        self._queue.put(lambda reporter: reporter.images(step, name, image))

    def params(self, values: dict[str, Any]) -> None:
        self._queue.put(lambda reporter: reporter.params(values))

    def close(self) -> None:
        self._queue.put(lambda reporter: reporter.close())
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            for index, reporter in enumerate(self._reporters):
                try:
                    call(reporter)
                except Exception as error:
                    if index not in self._failed:
                        self._failed.add(index)
                        _log.warning("%s failed, training goes on: %s", type(reporter).__name__, error)
