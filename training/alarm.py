"""When one worker fails, the others hear of it within seconds instead of waiting for it in a collective operation.

Each worker has a thread that looks at a mark in the process group's store. A worker that fails writes why; the others
abort the group, which wakes what waits for the GPU, and end with the first worker's message.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from pipeline.errors import Stopped, UserError, first_line
from training.world import World

_KEY, _HEARD = "failure", "heard"
_numbers = itertools.count()


class WorkerFailed(RuntimeError):
    """Another worker failed first; the text is its own."""


@contextlib.contextmanager
def shared_alarm(world: World, *, every_s: float = 1.0, grace_s: float = 30.0) -> Iterator[None]:
    """Work that all workers do together. An error on one of them ends it on all: as `UserError` where it is one, else
    as `WorkerFailed`. A worker that cannot be woken within grace_s ends its process with that message."""
    if world.size == 1:
        yield
        return
    # A connection of its own: who waits for a key on the group's, as NCCL does before its first message, keeps it from
    # everybody else. Every worker comes here equally often, so the numbers agree.
    base = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"latentzoom/alarm/{next(_numbers)}", base)
    over = threading.Event()
    heard: list[_Failure] = []

    def listen() -> None:
        while not over.wait(every_s):
            try:
                if not store.check([_KEY]):
                    continue
                failure = _read(store)
                store.add(_HEARD, 1)
            except Exception:  # the process that holds the store has ended, after its work or without a word
                if over.wait(10 * every_s):
                    return
                failure = _Failure(0, "its process ended without a word", False)
            heard.append(failure)
            with contextlib.suppress(Exception):
                dist.distributed_c10d._abort_process_group()
            if not over.wait(grace_s):
                print(f"latentzoom: error: {failure}", file=sys.stderr, flush=True)
                os._exit(1)
            return

    thread = threading.Thread(target=listen, name="alarm", daemon=True)
    thread.start()
    try:
        yield
    except Stopped:  # all were asked together
        raise
    except BaseException as error:
        over.set()
        first = heard[0] if heard else None
        with contextlib.suppress(Exception):  # the store may be gone
            first = first or _ring(store, world.rank, error)
            if world.is_main:  # the store may be in this process, which is about to end
                _wait_until_heard(store, world.size, 5 * every_s)
        if first is not None and first.rank != world.rank:
            raise first.as_error() from error
        raise
    finally:
        over.set()
        thread.join(grace_s)


class _Failure:
    """Who failed first, and how."""

    def __init__(self, rank: int, text: str, is_users: bool) -> None:
        self.rank, self.text, self.is_users = rank, text, is_users

    def __str__(self) -> str:
        return self.text if self.is_users else f"worker {self.rank} failed: {self.text}"

    def as_error(self) -> Exception:
        return UserError(str(self)) if self.is_users else WorkerFailed(str(self))


def _ring(store: Any, rank: int, error: BaseException) -> _Failure:
    """Write a failure where there is none yet → the first one."""
    is_users = isinstance(error, UserError)
    text = str(error) if is_users else f"{type(error).__name__}: {first_line(error)}"
    store.compare_set(_KEY, "", json.dumps([rank, text, is_users]))
    store.add(_HEARD, 1)
    return _read(store)


def _wait_until_heard(store: Any, num_workers: int, seconds: float) -> None:
    """Until every worker has heard of the failure, or has failed itself."""
    deadline = time.monotonic() + seconds
    while store.add(_HEARD, 0) < num_workers and time.monotonic() < deadline:
        time.sleep(0.02)


def _read(store: Any) -> _Failure:
    return _Failure(*json.loads(store.get(_KEY)))
