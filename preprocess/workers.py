"""Ray actors that build shards. A dead actor's unfinished shards go to another; bytes do not depend on who builds.

An actor dies alone or with its machine. Its successor may have to wait for a machine; the others go on meanwhile.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from pipeline.errors import UserError
from preprocess.build import Built, ShardBuilder
from preprocess.config import PreprocessConfig
from preprocess.lost_workers import LostWorkers
from preprocess.plan import ShardPlan

_MAX_CHUNK = 8


@ray.remote(max_restarts=0)
class ShardActor:
    """One builder in a process of its own."""

    def __init__(self, builder: ShardBuilder) -> None:
        self.builder = builder

    def ready(self) -> bool:
        return True

    def build(self, shards: list[ShardPlan]) -> Iterator[Built]:
        """News as they come; the next images are decoded while earlier shards are published."""
        yield from self.builder.build(shards)


@dataclass(eq=False)
class _Worker:
    """An actor and what it is doing. `key` names the present chunk in the driver's tally."""

    name: str
    actor: Any
    key: str = ""
    stream: Any = None
    shards: dict[str, ShardPlan] = field(default_factory=dict)


class WorkerPool:
    """Hands chunks of shards to actors and yields their news. `num_lost` counts actors that died."""

    def __init__(self, config: PreprocessConfig, builder: ShardBuilder, todo: list[ShardPlan]) -> None:
        self.config = config
        self.builder_ref = ray.put(builder)
        self.todo = deque(todo)
        self.num_workers = min(config.workers, len(todo))
        self.chunk = max(1, min(_MAX_CHUNK, len(todo) // (2 * max(1, self.num_workers))))
        self.num_lost = 0
        self.num_started = 0
        self.losses = LostWorkers()
        self.busy: dict[Any, _Worker] = {}  # Ray reference to wait for → worker

    def run(self) -> Iterator[tuple[str, Built]]:
        """(worker, news) until every shard is published."""
        try:
            for _ in range(self.num_workers):
                self._start()
            while self.todo or any(worker.shards for worker in self.busy.values()):
                ready, _ = ray.wait(list(self.busy), num_returns=1, fetch_local=True)
                worker = self.busy.pop(ready[0])
                try:
                    news = self._advance(worker, ready[0])
                except (ActorDiedError, ActorUnavailableError) as error:
                    self._replace(worker, error)
                    continue
                if news is not None:
                    yield worker.key, news
        finally:
            for worker in self.busy.values():
                ray.kill(worker.actor)

    def _start(self) -> None:
        """Ask for an actor; it gets shards once it is there."""
        self.num_started += 1
        options = {"num_cpus": self.config.cpus_per_worker, "num_gpus": self.config.gpus_per_worker}
        actor = ShardActor.options(**options).remote(self.builder_ref)  # type: ignore[attr-defined]
        worker = _Worker(f"worker {self.num_started}", actor)
        self.busy[actor.ready.remote()] = worker

    def _advance(self, worker: _Worker, ready: Any) -> Built | None:
        """Take one piece of news from a worker, or give it the next chunk."""
        if worker.stream is None:
            ray.get(ready)
            self.losses.worker_started()
            self._assign(worker)
            return None
        try:
            built: Built = ray.get(next(worker.stream))
        except StopIteration:
            self._assign(worker)
            return None
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, UserError) else error) from None
        if built.receipt is not None:
            worker.shards.pop(built.receipt["name"], None)
        self.busy[worker.stream] = worker
        return built

    def _assign(self, worker: _Worker) -> None:
        shards = [self.todo.popleft() for _ in range(min(self.chunk, len(self.todo)))]
        if not shards:
            ray.kill(worker.actor)
            return
        worker.shards = {shard.name: shard for shard in shards}
        worker.key = f"{worker.name}, {shards[0].name}"
        worker.stream = worker.actor.build.options(num_returns="streaming").remote(shards)
        self.busy[worker.stream] = worker

    def _replace(self, worker: _Worker, error: Exception) -> None:
        """Put a dead worker's shards back and start another worker, a few times."""
        ray.kill(worker.actor)  # one that is only out of reach would hold its CPUs and write on
        self.num_lost += 1
        names = list(worker.shards)
        self.losses.worker_died(names, error, had_started=worker.stream is not None)
        print(f"preprocess: {worker.name} died; redoing {', '.join(names) or 'nothing'}", file=sys.stderr)
        self.todo.extendleft(reversed(worker.shards.values()))
        self._start()


@contextmanager
def ray_session(config: PreprocessConfig) -> Iterator[None]:
    """The cluster of this job or of `--ray-address`; else a local one, stopped afterwards."""
    if ray.is_initialized():
        yield
        return
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        cpus = max(os.cpu_count() or 1, math.ceil(config.workers * config.cpus_per_worker))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
