"""Training runs in a folder: each has `run.json`, written when it begins (training/run.py)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from orchestration.runs.state import Curves, RunState, curves_of, run_state
from pipeline import storage
from pipeline.errors import UserError
from training.reporter import read_figures

_DEPTH = 4
"""How deep runs are looked for. A pipeline's are at WORKDIR/STEP/KEY."""
_GRID = re.compile(r".+-(\d{8})\.png")
_PATIENCE_S = 120.0
_PATIENCE_REPORTS = 5
_TIMES = ("mtime", "LastModified", "updated", "created")
"""What file systems call the time of the last change: seconds, or a datetime."""


def folder_runs(folder: str) -> list[RunState]:
    """The runs in a folder (path or URL), or the one that it is; named as they are seen from it. `UserError` where
    there is none."""
    folder = storage.absolute(folder)
    states = [_run(place, entries, folder) for place, entries in _places(folder, _DEPTH)]
    found = [state for state in states if state is not None]
    if not found:
        raise UserError(f"no training runs in {folder}; give a --run-dir of `latentzoom train`, or a folder of them")
    return found


def folder_curves(folder: str) -> Curves:
    """All figures of the run in a folder."""
    return curves_of(read_figures(folder))


def _run(place: str, entries: dict[str, dict[str, Any]], root: str) -> RunState | None:
    """None where run.json is another program's."""
    run = storage.read_json(storage.join(place, "run.json"))
    if not isinstance(run, dict) or not {"stage", "settings"} <= run.keys():
        return None
    settings, curves = run["settings"], folder_curves(place)
    steps, global_batch = int(settings["steps"]), int(settings["global_batch"])
    silent = _silent_s(entries)
    rate = curves["images_per_s"][-1][1] if "images_per_s" in curves else 0.0
    between_reports = settings["log_every"] * global_batch / rate if rate else 0.0
    if _is_done(place, entries, steps):
        state = "done"
    else:
        is_silent = silent is None or silent > max(_PATIENCE_S, _PATIENCE_REPORTS * between_reports)
        state = "silent" if is_silent else "running"
    return run_state(
        curves,
        place=place.removeprefix(root).strip("/") or place.rstrip("/").rsplit("/", 1)[-1],
        stage=run["stage"],
        state=state,
        steps=steps,
        global_batch=global_batch,
        silent_s=silent,
        grid=_newest_grid(place) if "grids" in entries else "",
    )


def _places(folder: str, depth: int) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Each run's folder, and what lies directly in it."""
    entries = _entries(folder)
    if "run.json" in entries:
        yield folder, entries
    elif depth:
        for name, entry in sorted(entries.items()):
            if entry["type"] == "directory":
                yield from _places(storage.join(folder, name), depth - 1)


def _entries(folder: str) -> dict[str, dict[str, Any]]:
    """Name → what the file system says of it, for all that lies directly in a folder."""
    if not storage.exists(folder):
        raise UserError(f"no such folder: {folder}")
    fs, path = storage.filesystem(folder)
    with storage.reaching(folder):
        if fs.isfile(path):
            raise UserError(f"{folder} is a file; give a folder")
        listed = fs.ls(path, detail=True)
    return {str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]: entry for entry in listed}


def _is_done(place: str, entries: dict[str, dict[str, Any]], steps: int) -> bool:
    """Whether the result is that of all steps, or was written since the run last began: then it ended early. One that
    goes on with more steps has the result of before."""
    if "result.json" not in entries:
        return False
    began, ended = _changed(entries["run.json"]), _changed(entries["result.json"])
    is_whole = int(storage.read_json(storage.join(place, "result.json"))["steps"]) >= steps
    return is_whole or (began is not None and ended is not None and ended >= began)


def _silent_s(entries: dict[str, dict[str, Any]]) -> float | None:
    """Seconds since the run began or reported, as far as the file system tells."""
    times = [_changed(entries[name]) for name in ("run.json", "metrics.jsonl") if name in entries]
    known = [moment for moment in times if moment is not None]
    return max(0.0, time.time() - max(known)) if known else None


def _changed(entry: dict[str, Any]) -> float | None:
    """When a file was last written, in seconds; None where the file system does not say."""
    moment = next((entry[key] for key in _TIMES if key in entry), None)
    if isinstance(moment, datetime):
        return moment.timestamp()
    return float(moment) if isinstance(moment, (int, float)) else None


def _newest_grid(place: str) -> str:
    names = storage.list_folder(storage.join(place, "grids"))
    grids = [(int(found[1]), name) for name in names if (found := _GRID.fullmatch(name))]
    return f"grids/{max(grids)[1]}" if grids else ""
