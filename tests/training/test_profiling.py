"""`--profile`: a trace of the steps that were asked for, and the costliest operations; the run itself is as ever."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_inputs import Shop
from test_resume import losses

from training.cli import main
from training.run import TrainResult

Run = Callable[..., TrainResult]


def test_a_run_is_profiled_and_learns_the_same(
    run_stage: Run, shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "latentzoom")
    settings = [word for s in ("steps=7", "log_every=1") for word in ("--set", f"denoiser.{s}")]
    words = [
        "denoiser",
        "--preset",
        "debug",
        "--data",
        shop.data,
        "--bundle",
        shop.bundle,
        "--local",
        "--device",
        "cpu",
    ]
    assert main([*words, "--run-dir", str(tmp_path / "run"), *settings, "--profile", "2"]) == 0
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "trace-00000004-00000005.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}  # torch counts from 0
    (text,) = [r.message for r in caplog.records if "trace (for ui.perfetto.dev)" in r.message]
    title, head, *rows = text.splitlines()
    assert str(trace) in title and "steps 4 to 5" in title and head.split()[0] == "share" and len(rows) == 10
    shares = [float(row.split("%")[0]) for row in rows]
    assert shares == sorted(shares, reverse=True) and 30 < sum(shares) <= 100.5
    assert any("conv" in row for row in rows)
    run_stage("denoiser", "denoiser.steps=7", "denoiser.log_every=1", run_dir=tmp_path / "plain")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.parametrize(("steps", "said"), [(3, "no step was profiled"), (5, "steps 4 to 5; trace")])
def test_a_run_that_ends_before(
    run_stage: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int, said: str
) -> None:
    caplog.set_level(logging.INFO, "latentzoom")
    assert run_stage("denoiser", f"denoiser.steps={steps}", profile=20).steps == steps
    assert said in caplog.text


def test_a_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["denoiser", "--preset", "debug", "--data", "x", "--run-dir", "y", "--local", "--profile", "-1"]
    assert main(words) == 2 and "--profile -1 is not allowed" in capsys.readouterr().err
