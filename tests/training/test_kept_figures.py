"""Figures outlive what they are sent to: a tracking server that hangs, a run folder far away."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestration.tracking import mlflow_reporter
from orchestration.tracking.mlflow_reporter import MlflowReporter
from pipeline import storage
from training import reporter
from training.reporter import FolderReporter


class Hanging:
    """Stands in for delivery to a server that does not answer until `answer` is set, and then with an error."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()

    def __call__(self, uri: str, run_id: str, event: dict[str, Any]) -> None:
        self.asked.set()
        self.answer.wait(60)
        raise ConnectionError("no answer")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Hanging:
    hanging = Hanging()
    monkeypatch.setattr(mlflow_reporter, "deliver", hanging)
    return hanging


def kept(spill: Path) -> list[int]:
    return sorted(json.loads(line)["step"] for line in spill.read_text().splitlines())


def open_reporter(spill: Path) -> MlflowReporter:
    return MlflowReporter("0" * 32, "http://down", spill=spill, system_metrics=False, close_timeout=0.1)


def test_figure_that_is_being_sent_when_the_run_ends_is_kept(server: Hanging, tmp_path: Path) -> None:
    mlflow = open_reporter(tmp_path / "spill.jsonl")
    for step in range(3):
        mlflow.metrics(step, {"loss": 1.0})
    assert server.asked.wait(10)
    mlflow.close()
    assert kept(tmp_path / "spill.jsonl") == [0, 1, 2]  # the process may end now
    server.answer.set()
    mlflow._thread.join(10)
    assert not mlflow._thread.is_alive()
    assert kept(tmp_path / "spill.jsonl") == [0, 1, 2]


def test_figures_kept_while_older_ones_are_replayed(server: Hanging, tmp_path: Path) -> None:
    spill = tmp_path / "spill.jsonl"
    for step in (0, 1):
        event = {"kind": "metrics", "step": step, "values": {"loss": 1.0}, "time_ms": 1}
        mlflow_reporter.append_spill(spill, "0" * 32, event)
    mlflow = open_reporter(spill)
    assert server.asked.wait(10)  # it replays
    mlflow.metrics(2, {"loss": 1.0})
    mlflow.close()
    server.answer.set()
    mlflow._thread.join(10)
    assert not mlflow._thread.is_alive()
    assert kept(spill) == [0, 1, 2]


def test_lines_reach_a_far_run_folder_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers in a cluster are killed without notice."""
    url = f"memory://{tmp_path.name}/run"
    monkeypatch.setattr(reporter, "_PUBLISH_SECONDS", 0.0)
    FolderReporter(url).metrics(1, {"loss": 0.5})
    again = FolderReporter(url, resume_step=1)
    again.metrics(2, {"loss": 0.25})
    again.close()
    lines = storage.read_bytes(f"{url}/metrics.jsonl").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
