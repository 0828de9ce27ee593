"""Between two reports nothing in a training step asks the device for a value: on CUDA every such question waits for all
the work before it. Here the questions are counted on the CPU, where they cost nothing."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_inputs import Shop
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import override
from training.run import TrainResult, train
from training.session import Session

aten = torch.ops.aten
_ASKING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default}
_ASKING |= {aten.masked_select.default, aten.unique_dim.default, aten._unique2.default}


class HostReads(TorchDispatchMode):
    """Counts operations whose result the program waits for, with where they were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING:
            frames = traceback.extract_stack()
            if not any(frame.name in _ON_THE_HOST for frame in frames):
                asker = [f for f in frames[:-1] if "/training/" in f.filename or "/pipeline/" in f.filename][-1]
                self.places.append(f"{asker.filename}:{asker.lineno}")
        return func(*args, **(kwargs or {}))


_ON_THE_HOST = {"draw_target", "draw_zoom", "_draw_crop"}
"""Functions whose numbers are drawn on the CPU, wherever training runs: sizes and windows of a step."""


def reads_by_step(monkeypatch: pytest.MonkeyPatch, run: Callable[[], TrainResult]) -> list[list[str]]:
    """What each optimizer step asks, from the end of the one before it to its own; reports are left out."""
    counter, by_step = HostReads(), []
    original, report = Session.end_step, Session._report

    def end_step(self: Session) -> None:
        original(self)
        by_step.append(list(counter.places))
        counter.places.clear()

    def unwatched(self: Session) -> None:
        before = len(counter.places)
        report(self)
        del counter.places[before:]

    monkeypatch.setattr(Session, "end_step", end_step)
    monkeypatch.setattr(Session, "_report", unwatched)
    with counter:
        run()
    return by_step


@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "denoiser", "align"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, run_stage: Callable[..., TrainResult], stage: str, precision: str
) -> None:
    settings = ["steps=4", "log_every=4", "checkpoint_every=4", "micro_batch=2", f"precision={precision}"]
    by_step = reads_by_step(monkeypatch, lambda: run_stage(stage, *(f"{stage}.{s}" for s in settings)))
    # The first batch may set things up; the last step saves.
    assert len(by_step) == 4 and by_step[1:3] == [[], []]


def test_super_resolution_neither(monkeypatch: pytest.MonkeyPatch, sr_shop: Shop, tmp_path: Path) -> None:
    preset = override(sr_shop.preset, [f"align.{s}" for s in ("steps=4", "log_every=4", "checkpoint_every=4")])
    places = {"data": sr_shop.data, "bundle": sr_shop.bundle, "run_dir": str(tmp_path / "run")}
    by_step = reads_by_step(monkeypatch, lambda: train("align", preset, device="cpu", **places))
    assert by_step[1:3] == [[], []]


def test_questions_are_counted(monkeypatch: pytest.MonkeyPatch, run_stage: Callable[..., TrainResult]) -> None:
    """The counter sees what a step would ask."""
    add = Session.backward

    def backward(self: Session, loss: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        float(loss)
        add(self, loss, terms)

    monkeypatch.setattr(Session, "backward", backward)
    by_step = reads_by_step(monkeypatch, lambda: run_stage("denoiser", "denoiser.steps=3", "denoiser.log_every=3"))
    assert all(len(asked) >= 1 for asked in by_step)
