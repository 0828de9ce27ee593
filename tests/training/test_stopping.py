"""How a run is asked to stop, and what it does then."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.errors import Stopped, UserError
from training import stopping
from training.run import TrainResult
from training.stopping import Stop, stop_on_signals

Run = Callable[..., TrainResult]
LONG = ["denoiser.steps=10000", "denoiser.checkpoint_every=10000", "denoiser.log_every=1"]


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_first_signal_asks_and_a_later_one_acts(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with stop_on_signals() as question:
        assert question() is Stop.NO
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the same wish: `timeout` signals the process, then its group
        assert question() is Stop.LEAVE
        monkeypatch.setattr(stopping, "_TWICE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_later_termination_ends_the_process() -> None:
    program = """
import os, signal
from training import stopping
stopping._TWICE_SECONDS = 0.0
with stopping.stop_on_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never printed", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == "still here\n"
    assert done.stderr == "\nlatentzoom: stopping after a checkpoint; once more stops at once\n"


def test_a_notice_saves_once_and_a_wish_to_leave_saves_again(
    run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "ASK_SECONDS", -1.0)
    wishes = itertools.chain([Stop.SAVE] * 5, [Stop.LEAVE])
    settings = [*LONG, "denoiser.log_every=1000"]  # reports may be far apart, a notice gives half a minute
    with pytest.raises(Stopped, match="stopped at step 6; run again to continue"):
        run_stage("denoiser", *settings, stop_requested=lambda: next(wishes))
    steps = sorted(int(path.parent.name[5:]) for path in tmp_path.glob("denoiser/checkpoints/step-*/manifest.json"))
    assert steps == [1, 6]


def test_a_run_whose_folder_was_taken_over_writes_no_more(
    run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "ASK_SECONDS", -1.0)

    def taken() -> None:
        raise UserError("lost the hold on s3://bucket/run; run the same command again")

    with stop_on_signals(taken) as question, pytest.raises(UserError, match="lost the hold"):
        run_stage("denoiser", *LONG, stop_requested=question)
    assert not list(tmp_path.glob("denoiser/checkpoints/step-*"))
