"""MLflow implementation of the training `Reporter`: metrics, step-indexed images and parameters of one run.

Training must never stop, or wait, because a tracking server does. Every event goes to a queue that one thread empties;
what cannot be delivered is appended to a local JSONL file (images as PNG files beside it) and delivered later: when the
server answers again, when the reporter closes, or when the next process opens the same spill file. Events carry the
time at which they happened, and MLflow ignores a metric that it already holds, so a replay cannot double anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from orchestration.tracking import store as tracking
from pipeline.redact import clean, plain_without_secrets, url_without_secrets

_log = logging.getLogger(__name__)
_RETRY_S = 15.0
_NOT_ALLOWED = re.compile(r"[^\w\-. /]")
_WRITING = threading.Lock()
"""Held while a spill file changes: one thread may replay it while another adds to it."""
Event = dict[str, Any]


class MlflowReporter:
    """Reports to the run `run_id` of the store at `uri`. Methods return at once and never raise.

    spill: the JSONL file for what could not be delivered (default: in the temporary folder, named after the run).
    system_metrics: also record CPU, memory, disk, network and GPU use of this machine every ten seconds.
    close_timeout: seconds that `close` waits for the queue before it spills the rest.
    """

    def __init__(
        self,
        run_id: str,
        tracking_uri: str,
        *,
        spill: str | Path | None = None,
        system_metrics: bool = True,
        close_timeout: float = 30.0,
    ) -> None:
        self.run_id, self.uri, self.close_timeout = run_id, tracking_uri, close_timeout
        self._shown = url_without_secrets(tracking_uri)
        self.spill = Path(spill or Path(tempfile.gettempdir()) / f"latentzoom-{run_id}.spill.jsonl")
        self.num_spilled = 0
        self._queue: queue.Queue[Event | None] = queue.Queue()
        self._in_flight: queue.Queue[Event] = queue.Queue()  # at most one: whoever takes it out answers for it
        self._broken_until = 0.0
        self._giving_up = threading.Event()
        self._monitor: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow-reporter", daemon=True)
        self._thread.start()
        if system_metrics:
            self._start_monitor()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of one step."""
        clean = {_clean(k): float(v) for k, v in values.items()}
        self._put({"kind": "metrics", "step": int(step), "values": clean})

    def images(self, step: int, name: str, image: np.ndarray) -> None:
        """Record a picture, uint8 (H, W, 3): it appears under `name` in the run's image grid, one entry a step."""
        self._put({"kind": "image", "step": int(step), "name": _clean(name), "image": np.array(image, copy=True)})

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings (nested mappings become dotted names): see `tracking.log_settings`."""
        flat = tracking.flatten(plain_without_secrets(dict(values)))
        self._put({"kind": "params", "values": {_clean(k): v for k, v in flat.items()}})

    def close(self) -> None:
        """Deliver what is queued; spill what cannot be delivered within `close_timeout` seconds."""
        if self._monitor is not None:
            with contextlib.suppress(Exception):
                self._monitor.finish()
            self._monitor = None
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(self.close_timeout)
            if self._thread.is_alive():
                self._giving_up.set()
                self._spill_rest(self._in_flight)  # it may be delivered yet, or end with this process
                self._spill_rest(self._queue)
                self._queue.put(None)  # the one from above was taken with the rest: the thread ends when it can
        if self.num_spilled:
            _log.warning(
                "MLflow at %s could not take %d events; they wait in %s", self._shown, self.num_spilled, self.spill
            )

    def __enter__(self) -> MlflowReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, event: Event) -> None:
        event["time_ms"] = int(time.time() * 1000)
        if self._thread.is_alive() and not self._giving_up.is_set():
            self._queue.put(event)
        else:
            self._save(event)

    def _work(self) -> None:
        if self.spill.exists():
            self._try_replay()
        while (event := self._queue.get()) is not None:
            self._handle(event)
        self._broken_until = 0.0
        self._try_replay()

    def _handle(self, event: Event) -> None:
        if self._giving_up.is_set() or time.monotonic() < self._broken_until:
            self._save(event)
            return
        self._in_flight.put(event)
        try:
            deliver(self.uri, self.run_id, event)
        except Exception as error:
            said = clean(str(error))
            _log.warning("MLflow at %s does not answer (%s); spilling to %s", self._shown, said, self.spill)
            self._broken_until = time.monotonic() + _RETRY_S
            self._spill_rest(self._in_flight)
            return
        with contextlib.suppress(queue.Empty):
            self._in_flight.get_nowait()
        if self.num_spilled:
            self._try_replay()

    def _save(self, event: Event) -> None:
        try:
            append_spill(self.spill, self.run_id, event)
            self.num_spilled += 1
        except OSError as error:
            _log.error("lost a tracking event: %s cannot be written (%s)", self.spill, error)

    def _try_replay(self) -> None:
        if not self.spill.exists() or self._giving_up.is_set():
            return
        try:
            replay(self.spill, self.uri)
            self.num_spilled = 0
        except Exception as error:
            _log.warning("replay of %s failed (%s); it is kept", self.spill, clean(str(error)))
            self._broken_until = time.monotonic() + _RETRY_S

    def _spill_rest(self, waiting: queue.Queue[Event] | queue.Queue[Event | None]) -> None:
        while True:
            try:
                event = waiting.get_nowait()
            except queue.Empty:
                return
            if event is not None:
                self._save(event)

    def _start_monitor(self) -> None:
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.ERROR)
            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()
        except Exception as error:
            _log.warning("no system metrics: %s", clean(str(error)))
            self._monitor = None


def deliver(uri: str, run_id: str, event: Event) -> None:
    """Send one event to MLflow. Raises whatever MLflow raises."""
    if event["kind"] == "metrics":
        tracking.log_metrics(uri, run_id, event["values"], step=event["step"], timestamp_ms=event["time_ms"])
    elif event["kind"] == "params":
        tracking.log_settings(uri, run_id, event["values"])
    elif event["kind"] == "image":
        picture = Image.fromarray(np.ascontiguousarray(event["image"]))
        tracking.client(uri).log_image(
            run_id, picture, key=event["name"], step=event["step"], timestamp=event["time_ms"], synchronous=True
        )
    else:
        raise ValueError(f"unknown event kind {event['kind']!r}")


def append_spill(spill: Path, run_id: str, event: Event) -> None:
    """Append one event to the JSONL file; a picture becomes a PNG file beside it."""
    spill.parent.mkdir(parents=True, exist_ok=True)
    line = {k: v for k, v in event.items() if k != "image"} | {"run_id": run_id}
    with _WRITING, open(spill, "a", encoding="utf-8") as file:
        if event["kind"] == "image":
            folder = spill.with_suffix(".images")
            folder.mkdir(exist_ok=True)
            line["file"] = f"{uuid.uuid4().hex}.png"
            Image.fromarray(np.ascontiguousarray(event["image"])).save(folder / line["file"])
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def replay(spill: str | Path, uri: str) -> int:
    """Deliver a spill file and return the number of events. A line is dropped from the file once it is delivered.

    A last line cut short by a crash is skipped. Raises what MLflow raises; the undelivered rest stays in the file.
    """
    spill = Path(spill)
    folder = spill.with_suffix(".images")
    lines = spill.read_text(encoding="utf-8").splitlines()
    done = 0
    try:
        for line in lines:
            event = _parse(line, folder)
            if event is not None:
                deliver(uri, event.pop("run_id"), event)
            done += 1
    finally:
        with _WRITING:
            _drop(spill, done)
    return done


def _drop(spill: Path, num: int) -> None:
    """Remove the first `num` lines; lines may have been added since they were read."""
    rest = spill.read_text(encoding="utf-8").splitlines()[num:]
    if rest:
        temporary = spill.with_suffix(".tmp")
        temporary.write_text("\n".join(rest) + "\n", encoding="utf-8")
        temporary.replace(spill)
        return
    spill.unlink()
    folder = spill.with_suffix(".images")
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def _parse(line: str, folder: Path) -> Event | None:
    try:
        event: Event = json.loads(line)
    except json.JSONDecodeError:
        return None
    if event["kind"] == "image":
        file = folder / event.pop("file")
        if not file.exists():
            return None
        with Image.open(file) as picture:
            event["image"] = np.asarray(picture)
    return event


def _clean(name: str) -> str:
    """MLflow allows letters, digits and `_-. /` in names."""
    return _NOT_ALLOWED.sub("_", name)
