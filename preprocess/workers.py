"""Ray actors that work off pieces of a job: shards here, samples in an evaluation. A dead actor's unfinished pieces go
to another; what comes out does not depend on who makes it.

An actor dies alone or with its machine. Its successor may have to wait for a machine; the others go on meanwhile.

This is a pool of our own and not Ray Data's: Ray Data cuts its batches as blocks come, while bytes that repeat need the
batches of the plan; it hands over a block at its end, while a piece counts here as soon as it is published, which is
also what an interrupted job continues from; and which piece a lost actor was at, and how often, it does not say, while
a picture that kills every worker has to be named. What it would bring, decoding on machines without a GPU, pays only
where decoding and not the encoder takes the time.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from pipeline.errors import UserError, is_network_error
from preprocess.build import Built, ShardBuilder
from preprocess.config import PreprocessConfig
from preprocess.local_ray import loopback_only
from preprocess.lost_workers import LostWorkers
from preprocess.plan import ShardPlan

_MAX_CHUNK = 8
_QUIET_S = 30.0
"""So long nobody may say anything before the workers are looked after."""
_BEGINS_S = 180.0
"""So long a process may take to begin an actor: it imports all that the actor needs, from a slow disk perhaps."""
_ON_ITS_WAY_S = 10.0
"""So long an answer may be behind a later one."""
Piece = TypeVar("Piece")
News = TypeVar("News")


@dataclass(eq=False)
class _Worker(Generic[Piece]):
    """An actor and what it is doing. `key` names the present chunk in the driver's tally; question: asked after the
    call that is waited for; begins_since: see `_is_lost_at_birth`."""

    name: str
    actor: Any
    key: str = ""
    stream: Any = None
    question: Any = None
    begins_since: float | None = None
    pieces: dict[str, Piece] = field(default_factory=dict)


class ActorPool(Generic[Piece, News]):
    """Hands chunks of pieces to actors and yields their news. `num_lost` counts actors that died.

    what: the job's name in messages. start: makes an actor, which has `ready()`, returning once it can work, and
    `work(pieces)`, a generator of news. name_of: piece → its name. finished: news → name of the piece that it finishes,
    or None. Raises the `UserError` that an actor raises, and one when actors die again and again.
    """

    def __init__(
        self,
        what: str,
        start: Callable[[], Any],
        todo: Sequence[Piece],
        *,
        num_workers: int,
        name_of: Callable[[Piece], str],
        finished: Callable[[News], str | None],
    ) -> None:
        self.what, self.start, self.name_of, self.finished = what, start, name_of, finished
        self.todo = deque(todo)
        self.num_workers = min(num_workers, len(todo))
        self.num_lost = 0
        self.num_started = 0
        self.losses = LostWorkers()
        self.busy: dict[Any, _Worker[Piece]] = {}  # Ray reference to wait for → worker

    def run(self) -> Iterator[tuple[str, News]]:
        """(worker, news) until every piece is finished."""
        try:
            for _ in range(self.num_workers):
                self._start()
            while self.todo or any(worker.pieces for worker in self.busy.values()):
                ready, _ = ray.wait(list(self.busy), num_returns=1, timeout=_QUIET_S, fetch_local=True)
                if not ready:
                    self._look_after()
                    continue
                worker = self.busy.pop(ready[0])
                worker.question = None
                try:
                    news = self._advance(worker, ready[0])
                except RayTaskError as error:
                    self._kill(worker)
                    raise raised(error) from None
                except (RayActorError, ObjectLostError) as error:
                    self._replace(worker, error)
                    continue
                if news is not None:
                    yield worker.key, news
        finally:
            for worker in self.busy.values():
                self._kill(worker)

    def _look_after(self) -> None:
        """Replace workers whose answer was lost with its connection, for which Ray would wait for ever: an actor does
        one thing after the other, so one that answers a later question has answered the earlier call."""
        for reference, worker in list(self.busy.items()):
            if (lost := self._lost(reference, worker)) is not None:
                del self.busy[reference]
                self._replace(worker, lost)

    def _lost(self, reference: Any, worker: _Worker[Piece]) -> Exception | None:
        if worker.stream is None and _is_lost_at_birth(worker):
            return ConnectionError("the word that it began was lost on the way")
        if worker.question is None:
            worker.question = worker.actor.__ray_ready__.remote()
        if not ray.wait([worker.question], timeout=0)[0]:
            return None
        try:
            ray.get(worker.question)
        except RayActorError as error:
            return error
        worker.question = None
        if ray.wait([reference], timeout=_ON_ITS_WAY_S)[0]:
            return None
        return ConnectionError("its answer was lost on the way")

    def _start(self) -> None:
        """Ask for an actor; it gets pieces once it is there."""
        self.num_started += 1
        worker: _Worker[Piece] = _Worker(f"worker {self.num_started}", self.start())
        self.busy[worker.actor.ready.remote()] = worker

    def _advance(self, worker: _Worker[Piece], ready: Any) -> News | None:
        """Take one piece of news from a worker, or give it the next chunk."""
        if worker.stream is None:
            ray.get(ready)
            self.losses.worker_started()
            self._assign(worker)
            return None
        try:
            news: News = ray.get(next(worker.stream))
        except StopIteration:
            self._assign(worker)
            return None
        if (name := self.finished(news)) is not None:
            worker.pieces.pop(name, None)
        self.busy[worker.stream] = worker
        return news

    def _assign(self, worker: _Worker[Piece]) -> None:
        share = len(self.todo) // (2 * self.num_workers)  # fewer towards the end, so that all end together
        pieces = [self.todo.popleft() for _ in range(min(max(1, min(_MAX_CHUNK, share)), len(self.todo)))]
        if not pieces:
            self._kill(worker)
            return
        worker.pieces = {self.name_of(piece): piece for piece in pieces}
        worker.key = f"{worker.name}, {self.name_of(pieces[0])}"
        worker.stream = worker.actor.work.options(num_returns="streaming").remote(pieces)
        self.busy[worker.stream] = worker

    def _replace(self, worker: _Worker[Piece], error: Exception) -> None:
        """Put a dead worker's pieces back and start another worker, a few times."""
        self._kill(worker)  # one that is only out of reach would hold its CPUs and write on
        self.num_lost += 1
        names = list(worker.pieces)
        self.losses.worker_died(names, error, had_started=worker.stream is not None)
        print(f"{self.what}: {worker.name} died; redoing {', '.join(names) or 'nothing'}", file=sys.stderr)
        self.todo.extendleft(reversed(worker.pieces.values()))
        self._start()

    @staticmethod
    def _kill(worker: _Worker[Piece]) -> None:
        ray.kill(worker.actor)


def _is_lost_at_birth(worker: _Worker[Any]) -> bool:
    """Whether Ray has had a process begin the actor for a while, and not heard that it is there: then it never
    will."""
    if not _begins(worker.actor):
        worker.begins_since = None
    elif worker.begins_since is None:
        worker.begins_since = time.monotonic()
    return worker.begins_since is not None and time.monotonic() - worker.begins_since > _BEGINS_S


def _begins(actor: Any) -> bool:
    from ray._private.state import actors

    state = actors(actor._actor_id.hex())
    return state.get("State") == "PENDING_CREATION" and bool(state.get("Pid"))


def raised(error: RayTaskError) -> BaseException:
    """What a worker raised, where that is a user's mistake or a network's: who started it words or retries it as if it
    were its own. Else Ray's error, with the worker's traceback."""
    cause = error.cause
    is_known = isinstance(cause, Exception) and (isinstance(cause, UserError) or is_network_error(cause))
    return cause if is_known else error


@ray.remote(max_restarts=0)
class ShardActor:
    """One builder in a process of its own."""

    def __init__(self, builder: ShardBuilder) -> None:
        self.builder = builder

    def ready(self) -> bool:
        return True

    def work(self, shards: list[ShardPlan]) -> Iterator[Built]:
        """News as they come; the next images are decoded while earlier shards are published."""
        yield from self.builder.build(shards)


def check_room(what: str, needs: dict[str, float], *, can_grow: bool) -> None:
    """`UserError` where no machine of the cluster has what a single worker needs; where machines may still come, a line
    that says what is waited for."""
    rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(room.get(name, 0.0) >= amount for name, amount in needs.items()) for room in rooms):
        return
    each = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
    text = f"{what}: each worker needs {each}, and no machine of the cluster has it"
    if not can_grow:
        raise UserError(f"{text}; ask for less for each worker, or add machines")
    print(f"{text}; waiting for one", file=sys.stderr, flush=True)


class WorkerPool(ActorPool[ShardPlan, Built]):
    """Actors that build shards."""

    def __init__(self, config: PreprocessConfig, builder: ShardBuilder, todo: list[ShardPlan]) -> None:
        needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
        check_room("preprocess", needs, can_grow=bool(config.ray_address or os.environ.get("RAY_ADDRESS")))
        reference = ray.put(builder)
        options = {"num_cpus": config.cpus_per_worker, "num_gpus": config.gpus_per_worker}
        super().__init__(
            "preprocess",
            lambda: ShardActor.options(**options).remote(reference),  # type: ignore[attr-defined]
            todo,
            num_workers=config.workers,
            name_of=lambda shard: shard.name,
            finished=lambda built: built.receipt["name"] if built.receipt is not None else None,
        )


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
        with loopback_only():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
