"""A worker that fails alone: the others end with its message, though they wait for it in a collective operation."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from two_workers import start_workers

from pipeline.errors import Stopped, UserError
from training.alarm import WorkerFailed, shared_alarm
from training.world import World, current_world

_LONG = 300.0
"""Seconds; far less than gloo's own limit of half an hour."""


def worker(how: str) -> None:
    """Worker 1 fails and goes on living, with its connections open; worker 0 waits for it."""
    world = current_world("cpu")
    try:
        with shared_alarm(world, every_s=0.2, grace_s=1.0):
            dist.barrier()
            if world.rank == 1:
                raise ZeroDivisionError("division by zero") if how == "crash" else UserError("no room in /data")
            if how == "store":  # as NCCL waits for the first worker's address before the first message
                dist.distributed_c10d._get_default_store().get("of nobody")
            dist.all_reduce(torch.ones(3))
    except UserError as error:
        print("user", error, flush=True)
    except ZeroDivisionError as error:
        print("crash", error, flush=True)
    time.sleep(_LONG)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("user", "no room in /data"),
        ("crash", "worker 1 failed: ZeroDivisionError: division by zero"),
        ("store", "no room in /data"),
    ],
)
def test_the_others_end_with_the_first_workers_message(how: str, message: str) -> None:
    waiting, failing = start_workers(__file__, how)
    try:
        output, _ = waiting.communicate(timeout=_LONG)
        assert failing.poll() is None, "the failing worker should have gone on"
    finally:
        failing.kill()
        failing.communicate()
    assert message in output and waiting.returncode == 1


def main_fails() -> None:
    """Worker 0, whose process holds the store, fails and ends at once; worker 1 asks seldom and has much to do."""
    world = current_world("cpu")
    try:
        with shared_alarm(world, every_s=2.0):
            dist.barrier()
            if world.rank == 0:
                raise UserError("no room in /data")
            time.sleep(5.0)
            dist.all_reduce(torch.ones(3))
    except UserError as error:
        print("user", error, flush=True)
    os._exit(0)


@pytest.mark.slow
def test_the_first_worker_tells_the_others_before_it_ends() -> None:
    outputs = [process.communicate(timeout=_LONG)[0] for process in start_workers(__file__, "main")]
    assert all("user no room in /data" in output for output in outputs), outputs


def both_fail() -> None:
    """Each fails of its own accord, worker 0 later: it says what failed first."""
    world = current_world("cpu")
    try:
        with shared_alarm(world, every_s=0.2):
            dist.barrier()
            time.sleep(2.0 if world.rank == 0 else 0.0)
            raise RuntimeError(f"mine, {world.rank}")
    except WorkerFailed as error:
        print(f"heard: {error}; then {error.__cause__}", flush=True)
    except RuntimeError as error:
        print(f"own: {error}", flush=True)


@pytest.mark.slow
def test_what_fails_later_says_what_failed_first() -> None:
    first, second = (process.communicate(timeout=_LONG)[0] for process in start_workers(__file__, "both"))
    assert "heard: worker 1 failed: RuntimeError: mine, 1; then mine, 0" in first
    assert "own: mine, 1" in second


def test_one_worker_has_nobody_to_tell() -> None:
    for error in (UserError("x"), Stopped("y")):
        with pytest.raises(type(error)), shared_alarm(World(0, 1, 0, torch.device("cpu"))):
            raise error


if __name__ == "__main__":
    {"both": both_fail, "main": main_fails}.get(sys.argv[1], lambda: worker(sys.argv[1]))()
