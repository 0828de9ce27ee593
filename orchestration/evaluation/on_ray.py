"""Chunks of an evaluation on Ray workers. A lost worker's chunks go to the others, and a new worker takes its place.

A worker dies alone or with its machine. Its successor may have to wait for a machine; the others go on meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from orchestration import registry
from orchestration.evaluation.chunk import Arrays, ChunkWorker
from orchestration.evaluation.data import Pictures
from orchestration.evaluation.networks import PACKAGED
from orchestration.evaluation.spec import EvaluationSpec, ModelReference
from orchestration.ray_train import cpus_for_each, machine_cpus, start_ray
from pipeline import storage
from pipeline.errors import UserError
from preprocess.lost_workers import LostWorkers

Chunk = tuple[int, int]
_QUEUED = 2


def compute_on_ray(
    spec: EvaluationSpec, model: ModelReference, pictures: Pictures, todo: list[Chunk], num_workers: int, device: str
) -> Iterator[tuple[Chunk, Arrays]]:
    """(chunk, arrays) as they finish. Each worker holds the model once and two chunks at most are queued on it.

    Raises `UserError` when a worker cannot load the model, or workers die again and again; and for a GPU by its number:
    each worker sees only the one that Ray gives it, which is its "cuda".
    """
    if device.startswith("cuda:") and device != "cuda:0":
        raise UserError(
            f"--device {device} names one GPU, and on Ray each worker is given one of its own; use --device cuda, or "
            "leave out --workers to evaluate on that one alone"
        )
    import ray
    from ray.exceptions import RayTaskError

    started = start_ray()
    try:
        num_workers = min(num_workers, len(todo))
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, "max_restarts": 0}
        if not device.startswith("cuda"):
            options |= {"num_cpus": cpus_for_each(machine_cpus(), num_workers), "num_gpus": 0}
        paths = {name: getattr(spec, name) for name in ("inception", "vgg16", "lpips", "lpips_heads")}
        absolute: dict[str, Any] = {
            name: storage.absolute(path) for name, path in paths.items() if path not in ("", PACKAGED)
        }
        spec = dataclasses.replace(spec, **absolute)  # workers have another working folder
        actor = ray.remote(_Worker).options(**options)
        yield from _ChunkPool(lambda: actor.remote(spec, model, pictures, device), todo).run(num_workers)
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, UserError) else error from error
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """A `ChunkWorker` in a process of its own."""

    def __init__(self, spec: EvaluationSpec, model: ModelReference, pictures: Pictures, device: str) -> None:
        self.arguments = spec, model, pictures, device

    def load(self) -> None:
        """Find and load the model."""
        import torch

        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        spec, model, pictures, device = self.arguments
        bundle = registry.resolve(model.uri, tracking_uri=model.tracking_uri)
        if registry.bundle_digest(bundle) != model.digest:
            raise UserError(f"{model.uri} changed while it was being evaluated; run the same command again")
        teacher = str(registry.resolve(spec.teacher, tracking_uri=model.tracking_uri)) if spec.teacher else ""
        self.worker = ChunkWorker(spec, str(bundle), pictures, device, teacher)

    def run(self, chunk: Chunk) -> Arrays:
        return self.worker.run(*chunk)


class _ChunkPool:
    """Hands chunks to workers. start: makes one worker, which gets chunks once it has loaded."""

    def __init__(self, start: Callable[[], Any], todo: list[Chunk]) -> None:
        self.start, self.todo = start, list(todo)
        self.waiting: dict[Any, tuple[Any, Chunk | None]] = {}  # Ray reference → (worker, chunk; None: it loads)
        self.losses = LostWorkers()

    def run(self, num_workers: int) -> Iterator[tuple[Chunk, Arrays]]:
        import ray
        from ray.exceptions import RayActorError

        try:
            for _ in range(num_workers):
                self._start()
            while self.todo or any(chunk for _, chunk in self.waiting.values()):
                finished, _ = ray.wait(list(self.waiting), num_returns=1)
                worker, chunk = self.waiting[finished[0]]
                try:
                    arrays = ray.get(finished[0])
                except RayActorError as error:
                    self._replace(worker, error)
                    continue
                del self.waiting[finished[0]]
                self.losses.worker_started()
                self._feed(worker)
                if chunk is not None:
                    yield chunk, arrays
        finally:
            for worker in {id(worker): worker for worker, _ in self.waiting.values()}.values():
                ray.kill(worker)

    def _start(self) -> None:
        worker = self.start()
        self.waiting[worker.load.remote()] = (worker, None)

    def _feed(self, worker: Any) -> None:
        """Keep a worker's queue full."""
        num = sum(other is worker for other, _ in self.waiting.values())
        for chunk in self.todo[: _QUEUED - num]:
            self.waiting[worker.run.remote(chunk)] = (worker, chunk)
        del self.todo[: _QUEUED - num]

    def _replace(self, worker: Any, error: Exception) -> None:
        """Put a lost worker's chunks back and start another worker, a few times."""
        import ray

        ray.kill(worker)  # one that is only out of reach would hold its CPUs
        refs = [ref for ref, (other, _) in self.waiting.items() if other is worker]
        lost = [chunk for ref in refs if (chunk := self.waiting.pop(ref)[1]) is not None]
        names = [f"samples {start} to {stop - 1}" for start, stop in lost]
        self.losses.worker_died(names, error, had_started=bool(lost))
        print(f"evaluate: a worker died; redoing {', '.join(names) or 'nothing'}", file=sys.stderr)
        self.todo[:0] = lost
        self._start()
