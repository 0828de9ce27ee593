"""`latentzoom runs [PLACE]`: training runs of a folder or of the tracking store, and their curves."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.runs.state import Curves, RunState

_RUN_ID = re.compile(r"[0-9a-f]{32}")
"""MLflow's."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="latentzoom runs", description="How far training runs are, or one run's curves as a picture."
    )
    parser.add_argument(
        "place",
        nargs="?",
        default="",
        metavar="PLACE",
        help="a run folder or a folder of them (path or URL), or a run's id in the store; without it the newest runs "
        "of the store",
    )
    parser.add_argument("--plot", default="", metavar="FILE.png", help="draw the run's curves over its steps")
    parser.add_argument("--json", action="store_true", help="print JSON, with all figures")
    parser.add_argument(
        "--tracking-uri",
        default="",
        metavar="URI",
        help="MLflow store; without it MLFLOW_TRACKING_URI, else ./mlflow.db",
    )
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    place, uri, target = arguments.place, arguments.tracking_uri, arguments.plot
    if target and not target.lower().endswith(".png"):
        raise UserError(f"--plot {target}: curves are drawn as PNG; give a name that ends with .png")
    from orchestration.runs.state import table

    if place and not _RUN_ID.fullmatch(place):
        from orchestration.runs.folder import folder_curves, folder_runs

        if uri:
            raise UserError(f"{place} is a folder, and --tracking-uri names a store; give one of them")
        runs = folder_runs(place)
        curves = partial(folder_curves, place)
    else:
        from orchestration.runs.store import store_curves, store_runs
        from orchestration.tracking import tracking_uri

        store = tracking_uri(uri)
        runs = store_runs(store, place)
        curves = partial(store_curves, store, runs[0].place)
    if target:
        _draw(runs, curves, target)
    elif arguments.json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], indent=1))
    else:
        print(table(runs))
    return 0


def _draw(runs: list[RunState], curves: Callable[[], Curves], target: str) -> None:
    from orchestration.runs.plot import plot
    from pipeline import storage

    if len(runs) != 1:
        places = ", ".join(run.place for run in runs[:3])
        raise UserError(f"--plot draws one run, and here are {len(runs)} ({places}{', …' if len(runs) > 3 else ''})")
    storage.write_bytes(target, plot(curves(), f"{runs[0].stage}, {runs[0].place}"))
    print(f"wrote {target}")
