"""`latentzoom runs [PLACE]`: training runs of a folder or of the tracking store, and their curves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import tyro

from pipeline.command_line import parse, plain_help
from pipeline.common_options import answer
from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.runs.state import Curves, RunState

_RUN_ID = re.compile(r"[0-9a-f]{32}")
"""MLflow's."""


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """How far training runs are, or one run's curves as a picture."""

    place: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PLACE]")] = ""
    """A run folder or a folder of them (path or URL), or a run's id in the store; without it the newest runs of the
    store. With --json all figures are printed."""
    plot: Annotated[str, tyro.conf.arg(metavar="FILE.png")] = ""
    """Draw the run's curves over its steps."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store; without it MLFLOW_TRACKING_URI, else ./mlflow.db."""


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom runs")
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
    else:
        answer(table(runs), runs)
    return 0


def _draw(runs: list[RunState], curves: Callable[[], Curves], target: str) -> None:
    from orchestration.runs.plot import plot
    from pipeline import storage

    if len(runs) != 1:
        places = ", ".join(run.place for run in runs[:3])
        raise UserError(f"--plot draws one run, and here are {len(runs)} ({places}{', …' if len(runs) > 3 else ''})")
    storage.write_bytes(target, plot(curves(), f"{runs[0].stage}, {runs[0].place}"))
    answer(f"wrote {target}", {"plot": target})
