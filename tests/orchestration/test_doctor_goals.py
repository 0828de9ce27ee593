"""The part of `latentzoom doctor --gpu` that holds speed beside its goals: rehearsed small, and what it counts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestration.doctor import gpu, gpu_parts
from orchestration.doctor.goals import goal, host_reads, measure
from training.session import Session
from training.stages import align

NAMES = (
    "stage 2: data wait, %",
    "stage 2: host synchronisations a step",
    "stage 2: steps/s, % of those without bookkeeping",
    "liif 64² float32, % of the matrix rate",
)


@pytest.mark.slow
def test_a_rehearsal_measures_every_goal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step that reads one figure is found out, and nothing else in it is."""
    make_engine, add = align.make_engine, Session.backward

    def backward(self: Session, loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        float(loss)
        add(self, loss, terms)

    monkeypatch.setattr(Session, "backward", backward)
    found = measure("cpu", tmp_path)
    assert {name for name, value in found.items() if isinstance(value, dict)} == set(NAMES)
    assert found[NAMES[1]] == {"measured": 1.0, "goal": "<= 0", "met": False}
    [place] = found["stage 2: where the host waits"].split(", ")
    assert place.startswith("test_doctor_goals.py:")
    assert 0 <= found[NAMES[0]]["measured"] < 100 and found[NAMES[2]]["measured"] > 0 < found[NAMES[3]]["measured"]
    assert found["stage 2: steps/s"] > 0 < found["stage 2: steps/s without bookkeeping"]
    assert align.make_engine is make_engine
    # What was measured is thrown away: no checkpoint and no bundle.
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"metrics.jsonl", "run.json"}


def test_cuda_tells_where_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By warnings, of which those of the mode itself and those about other things do not count."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with host_reads("cuda") as places:
        for _ in range(2):  # twice at one place is two
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    assert len(places) == 2 and all(place.startswith("test_doctor_goals.py:") for place in places)
    assert modes == ["warn", "default"]


def test_goals_stand_beside_their_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: dict[str, Any] = {"wait": goal(2.0, "<", 2), "share": goal(85.0, ">=", 85), "reads": goal(0.0, "<=", 0)}
    assert [figure["met"] for figure in figures.values()] == [False, True, True]
    monkeypatch.setattr("orchestration.doctor.goals.measure", lambda device, folder: figures)
    found = gpu_parts.run_part("goals", gpu_parts.Bench("cuda", tmp_path))
    assert found["state"] == "ok" and found["text"] == "missed: wait" and found["figures"] == figures
    text = gpu.page({"card": "H100"}, [gpu.Outcome("goals", "ok", 1.0, found["text"], figures)])
    assert "| wait | 2 (goal < 2: MISSED) |" in text and "| share | 85 (goal >= 85: met) |" in text
    assert "| goals | ok | 1 | missed: wait |" in text
