"""Training runs of a tracking store: the MLflow runs that `latentzoom train` and `pipeline` began."""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING

from orchestration import tracking
from orchestration.local_store import artifact_place
from orchestration.runs.state import Curves, RunState, run_state
from orchestration.stage_run import PLACE
from pipeline.errors import UserError
from pipeline.redact import url_without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_STATES = {"RUNNING": "running", "FINISHED": "done", "FAILED": "failed", "KILLED": "killed", "SCHEDULED": "waiting"}
_NEWEST = 50
_SHOWN = ("images_per_s", "loss")
"""Of a list each run's newest values cost one question, and the step of these one more."""
_GRID = re.compile(r"images/.+step\+(\d+)\+.+(?<!compressed)\.(png|webp)")


def store_runs(uri: str, run_id: str = "") -> list[RunState]:
    """The newest stage runs of the store, newest first, or the one with an id. `UserError` where there is none."""
    client = tracking.client(uri)
    with tracking.user_errors(uri):
        if run_id:
            return [_state(uri, client, client.get_run(run_id))]
        experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
        found = (
            client.search_runs([experiment.experiment_id], f"tags.`{PLACE}` LIKE '%'", max_results=_NEWEST)
            if experiment
            else []
        )
        if not found:
            raise UserError(f"no training runs in {url_without_secrets(uri)}; give a run folder, or another store")
        return [_state(uri, client, run) for run in found]


def store_curves(uri: str, run_id: str) -> Curves:
    """All figures of one run, but what MLflow measured of the machine."""
    client = tracking.client(uri)
    with tracking.user_errors(uri):
        names = [name for name in client.get_run(run_id).data.metrics if not name.startswith("system/")]
        return {name: _history(client, run_id, name) for name in names}


def _history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """A step that was repeated after a restart counts as it was reported last."""
    points = sorted(client.get_metric_history(run_id, name), key=lambda metric: (metric.step, metric.timestamp))
    return list({int(metric.step): float(metric.value) for metric in points if math.isfinite(metric.value)}.items())


def _state(uri: str, client: MlflowClient, run: Run) -> RunState:
    run_id, params = str(run.info.run_id), run.data.params
    newest = {n: v for n, v in run.data.metrics.items() if not n.startswith("system/") and math.isfinite(v)}
    counted = next((name for name in _SHOWN if name in newest), None)
    history = client.get_metric_history(run_id, counted) if counted else []
    step = max((metric.step for metric in history), default=0)
    reported = max((metric.timestamp for metric in history), default=run.info.start_time) / 1000
    return run_state(
        {name: [(step, value)] for name, value in newest.items()},
        place=run_id,
        stage=str(run.info.run_name),
        state=_STATES.get(run.info.status, run.info.status.lower()),
        steps=int(run.data.tags.get(tracking.STEPS, params.get("steps", 0))),
        global_batch=int(params.get("global_batch", 0)),
        silent_s=max(0.0, time.time() - reported),
        grid=_newest_grid(uri, client, run),
    )


def _newest_grid(uri: str, client: MlflowClient, run: Run) -> str:
    paths = [str(file.path) for file in client.list_artifacts(run.info.run_id, "images")]
    grids = [(int(found[1]), path) for path in paths if (found := _GRID.fullmatch(path))]
    return f"{artifact_place(uri, run.info.artifact_uri)}/{max(grids)[1]}" if grids else ""
