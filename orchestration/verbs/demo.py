"""`latentzoom demo`: the starter at once, the whole chain in minutes. Kill it and run it again: it continues."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestration.chain.lease import sole_job
from orchestration.chain.steps import Result
from orchestration.demo.photos import MODEL_NAME
from orchestration.text_table import text_table
from orchestration.tracking import store as tracking
from pipeline.command_line import parse, plain_help
from pipeline.common_options import answer
from pipeline.errors import require_range


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Enlarge photographs with the starter; train, evaluate, register, promote and use a tiny model of a picture."""

    workdir: Path = Path("demo")
    """Folder for everything the demo writes."""
    minutes: float = 10.0
    """About how long it may take on two CPU cores; more minutes, better pictures."""

    def __post_init__(self) -> None:
        require_range(self, 5, 100_000, "minutes")


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom demo")
    with _own_token():
        return _run(arguments)


@contextlib.contextmanager
def _own_token() -> Iterator[None]:
    """A token for the Ray of this run alone, where none is set: none is left in the home folder."""
    if {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_TOKEN", None)


def _run(arguments: Arguments) -> int:
    from orchestration.chain.run import announcer, run_chain
    from orchestration.chain.steps import run_steps
    from orchestration.demo.chain import act_one, act_two, open_demo

    demo = open_demo(arguments.workdir, arguments.minutes)
    start = time.monotonic()
    with sole_job(str(demo.work), "demo", "--workdir") as still_ours:
        print(f"latentzoom demo: two acts, about {arguments.minutes:g} minutes, in {demo.work}", flush=True)
        results = run_steps(str(demo.work), act_one(demo), announce=announcer(start, "act 1, step"))
        print(_enlarged(results["enlarge"], demo.enlarged), flush=True)
        chain, steps = act_two(demo)
        chain.still_ours = still_ours
        results |= run_chain(chain, steps, announce=announcer(start, "act 2, step"))
    answer(f"{_table(results)}\n{_after(demo.work, demo.tracking_uri, results)}", results)
    return 0


def _enlarged(result: Result, picture: Path) -> str:
    from orchestration.demo.enlargements import Figures, table

    figures = [Figures(**row) for row in result["figures"]]
    return f"\n{table(figures, result['lpips_name'])}\nLook at {picture}\n"


def _table(results: dict[str, Result]) -> str:
    rows = [("stage", "seconds", "loss first", "last", "key metric")]
    for name, result in results.items():
        first, last = (result.get(key) for key in ("first_loss", "last_loss"))
        rows.append((name, f"{result['seconds']:.0f}", _number(first), _number(last), str(result.get("metric", ""))))
    rows.append(("total", f"{sum(r['seconds'] for r in results.values()):.0f}", "", "", ""))
    return f"\n{text_table(rows, right=(1, 2, 3), rule_after=1)}"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _after(work: Path, tracking_uri: str, results: dict[str, Result]) -> str:
    from orchestration.demo.chain import held_out_psnr

    psnr = held_out_psnr(results)
    bin_folder = Path(sys.executable).parent
    experiment = tracking.experiment_id(tracking_uri, tracking.EXPERIMENT)
    champion = f"--model models:/{MODEL_NAME}@champion"
    return f"""
On the held-out strip of the field the implicit decoder rebuilds a crop from its latent at {psnr["ours"]:.2f} dB \
(mean PSNR).
A thumbnail with as many numbers as the latent gives {psnr["nearest"]:.2f} dB enlarged by nearest neighbour and \
{psnr["bicubic"]:.2f} dB by bicubic.
The galaxies' model is tiny and has seen one picture for minutes; `make demo MINUTES=60` spends more.

look at   {results["use"]["sheet"]}
registry  {work / "mlflow.db"} (model {MODEL_NAME}, champion is version {results["promote"]["champion"]})
browse    {bin_folder}/mlflow ui --backend-store-uri {tracking_uri}
          then http://127.0.0.1:5000/#/experiments/{experiment}/runs?workflowType=machine_learning
try       {bin_folder}/latentzoom upscale --scale 3.7 {work / "photos/coffee.png"} coffee-x3.7.png
          export MLFLOW_TRACKING_URI={tracking_uri}
          {bin_folder}/latentzoom generate {champion} --latent-size 48x96 --size 768x1536 --num 4 --seed 7 --out made"""
