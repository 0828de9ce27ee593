"""A snapshot on a machine's second GPU, with a recording stand-in for torch.cuda: whatever is done there is done on the
device of the tensors, by its stream, after its work so far."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from training import snapshots
from training.snapshots import CpuCopies, Snapshot

SECOND = torch.device("cuda", 1)


class OnSecond(Tensor):
    """A CPU tensor that says it is on the second GPU, and what is asked of it to the recorder."""

    recorder: Recorder

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return SECOND

    def detach(self) -> Tensor:
        self.recorder.say("copy")
        return self.as_subclass(Tensor).clone()


class Recorder:
    """torch.cuda of a machine with two GPUs. Each thread begins on device 0 and its default stream."""

    def __init__(self) -> None:
        self.events: list[tuple[str, torch.device, str]] = []
        self.here = threading.local()

    @property
    def now(self) -> torch.device:
        return getattr(self.here, "device", torch.device("cuda", 0))

    @property
    def stream_now(self) -> str:
        return getattr(self.here, "stream", f"default of {self.now}")

    def say(self, what: str) -> None:
        self.events.append((what, self.now, self.stream_now))

    def current_stream(self, device: torch.device | None = None) -> Any:
        return FakeStream(self, device or self.now, f"default of {device or self.now}")

    def Stream(self, device: torch.device | None = None) -> Any:
        return FakeStream(self, device or self.now, f"own of {device or self.now}")

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.here.device = self.now, device
        yield
        self.here.device = before

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, device = self.stream_now, self.now
        self.here.stream, self.here.device = stream.name, stream.place
        yield
        self.here.stream, self.here.device = before, device


class FakeStream:
    def __init__(self, recorder: Recorder, place: torch.device, name: str) -> None:
        self.recorder, self.place, self.name = recorder, place, name

    def record_event(self) -> str:
        self.recorder.events.append(("record", self.place, self.name))
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.recorder.events.append((f"wait for {event}", self.place, self.name))

    def synchronize(self) -> None:
        self.recorder.events.append(("synchronize", self.place, self.name))


def test_the_copy_is_made_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(snapshots, "cuda", recorder)
    monkeypatch.setattr(OnSecond, "recorder", recorder, raising=False)

    def empty(tensor: Tensor) -> Tensor:
        recorder.say("page-locked memory")  # made by the context of the device that is current
        return torch.empty(tensor.shape)

    monkeypatch.setattr(snapshots, "_empty_on_cpu", empty)
    state = {"state.pt": {"weight": torch.arange(6.0).as_subclass(OnSecond), "steps": [3, torch.ones(())]}}
    with recorder.device(SECOND):
        snapshot = Snapshot(state, CpuCopies())
    taken: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: taken.update(snapshot.files()))
    thread.start()
    thread.join()
    assert torch.equal(taken["state.pt"]["weight"], torch.arange(6.0)) and taken["state.pt"]["steps"][0] == 3
    assert {device for _, device, _ in recorder.events} == {SECOND}
    own, default = f"own of {SECOND}", f"default of {SECOND}"
    assert [(what, stream) for what, _, stream in recorder.events if what != "page-locked memory"] == [
        ("record", default),
        (f"wait for event of {default}", own),
        ("copy", own),
        ("synchronize", own),
    ]


def test_a_state_on_the_cpu_asks_nothing_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where CUDA has been used: no stream, no context, no page-locked memory."""
    monkeypatch.setattr(snapshots, "cuda", None)
    files = Snapshot({"a": torch.ones(2)}, CpuCopies()).files()
    assert torch.equal(files["a"], torch.ones(2))
