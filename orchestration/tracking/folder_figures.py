"""What a run folder already holds, sent to an MLflow run that begins late because the store was away at first."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import numpy as np
from PIL import Image

from orchestration.tracking import store as tracking
from orchestration.tracking.mlflow_reporter import deliver
from pipeline import storage
from training.reporter import read_figures

_GRID = re.compile(r"grids/(.+)-(\d{8})\.png")
_AT_ONCE = 1000


def send_folder(uri: str, run_id: str, run_dir: str) -> None:
    """Settings, figures of every step and picture grids of `run_dir` (path or URL) → the run. An empty folder sends
    nothing. Raises `UserError` when the store goes away meanwhile."""
    names = set(storage.list_files(run_dir))
    with tracking.user_errors(uri):
        if "run.json" in names:
            run = storage.read_json(storage.join(run_dir, "run.json"))
            settings = {"stage": run["stage"], **run["settings"], "model": run["model"], "data": run["data"]}
            tracking.log_settings(uri, run_id, settings)
        _send_figures(uri, run_id, read_figures(run_dir))
        for name in sorted(names):
            if found := _GRID.fullmatch(name):
                data = storage.read_bytes(storage.join(run_dir, name))
                picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                event = {"kind": "image", "step": int(found[2]), "name": found[1], "image": picture}
                deliver(uri, run_id, {**event, "time_ms": _now()})


def _send_figures(uri: str, run_id: str, lines: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    now = _now()
    metrics = [Metric(k, float(v), now, line["step"]) for line in lines for k, v in line.items() if k != "step"]
    for start in range(0, len(metrics), _AT_ONCE):
        tracking.client(uri).log_batch(run_id, metrics=metrics[start : start + _AT_ONCE])


def _now() -> int:
    return int(time.time() * 1000)
