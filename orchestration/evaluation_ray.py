"""Chunks of an evaluation on Ray workers. A worker that dies is started again and its chunk repeated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from orchestration.evaluation_chunk import Arrays, ChunkWorker
from orchestration.evaluation_data import Pictures
from orchestration.evaluation_spec import EvaluationSpec
from orchestration.ray_train import start_ray
from pipeline.errors import UserError

Chunk = tuple[int, int]


def compute_on_ray(
    spec: EvaluationSpec, bundle: str, pictures: Pictures, todo: list[Chunk], num_workers: int, device: str
) -> Iterator[tuple[Chunk, Arrays]]:
    """(chunk, arrays) as they finish. Each worker holds the model once and two chunks at most are queued on it."""
    import ray
    from ray.exceptions import RayTaskError

    started = start_ray()
    try:
        num_workers = min(num_workers, len(todo))
        cpus = ray.cluster_resources().get("CPU", 1.0) / num_workers
        options: dict[str, Any] = {"num_cpus": max(1, int(cpus)) if cpus >= 1 else cpus, "max_restarts": 3}
        options |= {"max_task_retries": 3, "num_gpus": 1 if device.startswith("cuda") else 0}
        actor = ray.remote(_Worker).options(**options)
        workers = [actor.remote(spec, bundle, pictures, device) for _ in range(num_workers)]
        yield from _drain(workers, list(todo))
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, UserError) else error from error
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """A `ChunkWorker` in a process of its own."""

    def __init__(self, spec: EvaluationSpec, bundle: str, pictures: Pictures, device: str) -> None:
        import torch

        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.worker = ChunkWorker(spec, bundle, pictures, device)

    def run(self, chunk: Chunk) -> Arrays:
        return self.worker.run(*chunk)


def _drain(workers: list[Any], todo: list[Chunk]) -> Iterator[tuple[Chunk, Arrays]]:
    import ray

    running: dict[Any, tuple[Chunk, Any]] = {}
    for worker in workers * 2:
        if todo:
            chunk = todo.pop(0)
            running[worker.run.remote(chunk)] = (chunk, worker)
    while running:
        finished, _ = ray.wait(list(running), num_returns=1)
        chunk, worker = running.pop(finished[0])
        yield chunk, ray.get(finished[0])
        if todo:
            following = todo.pop(0)
            running[worker.run.remote(following)] = (following, worker)
