"""A snapshot is of the step at which it was taken, although it is copied later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from training.config import StageConfig
from training.engine import make_engine
from training.engine_local import LocalEngine
from training.snapshots import CpuCopies, Snapshot, tensors_of
from training.world import World

ONE = World(0, 1, 0, torch.device("cpu"))


def engine() -> LocalEngine:
    torch.manual_seed(0)
    made = make_engine(nn.Conv2d(3, 4, 3), StageConfig(channels_last=True), ONE, deepspeed=False)
    assert isinstance(made, LocalEngine)
    learn(made, 1)
    return made


def learn(made: LocalEngine, step: int) -> None:
    made.backward(made(torch.randn(2, 3, 5, 5)).square().mean())
    made.step(step, 1e-2)


def test_the_next_step_waits_until_the_state_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    weight = made.module.weight.detach().clone()
    snapshot, files = made.snapshot(), {}
    original = snapshot.wait

    def wait() -> float:
        files.update(snapshot.files())  # as late as can be
        return original()

    monkeypatch.setattr(snapshot, "wait", wait)
    learn(made, 2)
    assert torch.equal(files["state.pt"]["module"]["weight"], weight)
    assert not torch.equal(made.module.weight, weight)


def test_a_snapshot_that_fails_lets_training_go_on() -> None:
    class Broken(CpuCopies):
        def take(self, value: object) -> object:
            raise MemoryError("no room")

    snapshot = Snapshot({}, Broken())
    with pytest.raises(MemoryError):
        snapshot.files()
    assert snapshot.wait() >= 0


def test_copies_keep_their_order_in_memory_and_are_used_again() -> None:
    copies, tensor = CpuCopies(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    first = copies.take({"a": [tensor, 3]})["a"][0]
    assert torch.equal(first, tensor) and first.stride() == tensor.stride() and first.data_ptr() != tensor.data_ptr()
    assert copies.take({"a": [tensor + 1, 3]})["a"][0] is first and torch.equal(first, tensor + 1)


def test_averages_survive_channels_last_weights(tmp_path: Path) -> None:
    """They are kept in the weights' order in memory and stored rows first."""
    from safetensors.torch import load_file

    from training.checkpoint import CheckpointStore

    made, again = engine(), engine()
    store = CheckpointStore(str(tmp_path), ONE, keep=1)
    store.save(1, made.name, made.snapshot().files, {})
    store.close()
    learn(again, 2)
    again.load(tmp_path / "step-00000001", 1)
    averages, loaded = made.averaged(), again.averaged()
    assert averages is not None and loaded is not None
    assert all(torch.equal(loaded[name], average) for name, average in averages.items())
    stored = load_file(tmp_path / "step-00000001/ema-00000.safetensors")
    assert torch.equal(stored["0:weight"], averages["weight"])
    assert len(tensors_of([stored, (averages, 1)])) == 4
