"""Ray's run of a trainer, which signals and a lost lease end in order."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from orchestration.cluster.relay import Relay, is_ray_there
from pipeline.errors import Stopped
from training.stopping import Stop, stop_on_signals

_UNHEARD_S = 5.0
"""So long a run that is asked to end may be without workers: those that have ended may be succeeded meanwhile."""
_ENDING_S = 30.0
"""So long Ray has to end a run that is given up."""


def fit(trainer: Any, relay: Relay, still_ours: Callable[[], None]) -> Any:
    """Ray's result. This thread listens for signals meanwhile: on its own, Ray drops a run at once on Ctrl-C. `Stopped`
    where a run is asked to end whose workers are gone, and which waits for others: nobody would hear it."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    heard = time.monotonic()
    try:
        with stop_on_signals(still_ours) as stop_asked:
            while not wait([outcome], timeout=0.5).done:
                if stop_asked() is not Stop.LEAVE:
                    heard = time.monotonic()
                    continue
                if not relay.ask_to_stop():
                    raise KeyboardInterrupt  # the signal went to Ray's processes too, and they are gone
                heard = time.monotonic() if _actors("RayTrainWorker", {"ALIVE"}) else heard
                if time.monotonic() - heard > _UNHEARD_S:
                    raise Stopped("stopped while it waited for workers; run the same command again to go on")
    finally:
        _end(thread)
    return outcome.result()


def _end(thread: threading.Thread) -> None:
    """Have the thread return that waits for Ray, by ending what it waits for, and the workers with it: Ray crashes the
    process where it is shut down while a thread waits for it."""
    import ray
    from ray._private.worker import global_worker

    core: Any = global_worker.core_worker  # type: ignore[attr-defined]
    begun = {"DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING"}
    deadline = time.monotonic() + _ENDING_S
    thread.join(0.5)
    while thread.is_alive() and time.monotonic() < deadline and is_ray_there():
        with contextlib.suppress(Exception):  # it ended meanwhile
            for ident in _actors("TrainController", begun):
                core.kill_actor(ray.ActorID.from_hex(ident), True)
        thread.join(0.5)


def _actors(name: str, states: set[str]) -> list[str]:
    """Ids of this run's actors of a class that are in one of some states."""
    import ray
    from ray._private.state import actors

    job = ray.get_runtime_context().get_job_id()
    found = ((a["ActorClassName"], a["JobID"], a["State"], ident) for ident, a in actors().items())
    return [ident for kind, of_job, state, ident in found if kind == name and of_job == job and state in states]
