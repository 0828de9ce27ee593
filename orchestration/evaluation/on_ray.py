"""Chunks of an evaluation on Ray workers, by the pool that builds shards: a lost worker's chunks go to the others, and
a new worker takes its place. The workers' devices are decided by the cluster, not by the machine that asks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from orchestration.cluster.cluster_size import (
    await_room,
    cpus_for_each,
    gpus_of_each,
    machine_cpus,
    reachable_resources,
)
from orchestration.cluster.ray_train import start_ray
from orchestration.registry import versions as registry
from orchestration.registry.stored_bundle import in_cache
from orchestration.tracking import store as tracking
from pipeline import storage
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from preprocess.workers import ActorPool
from training.evaluation.chunk import Arrays, ChunkWorker
from training.evaluation.data import Pictures
from training.evaluation.networks import PACKAGED
from training.evaluation.report import Report
from training.evaluation.spec import EvaluationSpec, ModelReference
from training.evaluation.speed import with_speed
from training.starts import address

Chunk = tuple[int, int]


def compute_on_ray(
    spec: EvaluationSpec,
    model: ModelReference,
    pictures: Pictures,
    todo: list[Chunk],
    num_workers: int,
    gpus_per_worker: float | None = None,
) -> Iterator[tuple[Chunk, Arrays]]:
    """(chunk, arrays) as they finish. Each worker holds the model once.

    gpus_per_worker: 0 computes on CPUs; None takes one GPU a worker where the cluster has any. Raises `UserError` when
    a worker cannot load the model, or workers die again and again.
    """
    import ray

    with _ray():
        num_workers = min(num_workers, len(todo))
        options, device = _place(num_workers, gpus_per_worker)
        paths = {name: getattr(spec, name) for name in ("inception", "vgg16", "lpips", "lpips_heads")}
        absolute: dict[str, Any] = {
            name: storage.absolute(path) for name, path in paths.items() if path not in ("", PACKAGED)
        }
        spec = dataclasses.replace(spec, **absolute)  # workers have another working folder
        actor = ray.remote(ChunkActor).options(**options, max_restarts=0)
        pool: ActorPool[Chunk, tuple[Chunk, Arrays]] = ActorPool(
            "evaluate",
            lambda: actor.remote(spec, model, pictures, device),
            todo,
            num_workers=num_workers,
            name_of=_name,
            finished=lambda news: _name(news[0]),
        )
        for _, news in pool.run():
            yield news


def speed_on_ray(
    report: Report,
    spec: EvaluationSpec,
    model: str,
    *,
    tracking_uri: str | None = None,
    gpus_per_worker: float | None = None,
) -> Report:
    """`with_speed` of the model at an address, on a worker of the cluster."""
    import ray

    with _ray():
        options, device = _place(1, gpus_per_worker)
        actor = ray.remote(SpeedActor).options(**options, max_restarts=0)
        uri = tracking.tracking_uri(tracking_uri)
        pool: ActorPool[Report, Report] = ActorPool(
            "evaluate",
            lambda: actor.remote(spec, address(model), uri, device),
            [report],
            num_workers=1,
            name_of=lambda _: "speed",
            finished=lambda _: "speed",
        )
        [(_, found)] = pool.run()
    return found


class SpeedActor:
    """`with_speed` in a process of its own."""

    def __init__(self, spec: EvaluationSpec, model: str, tracking_uri: str, device: str) -> None:
        self.spec, self.model, self.tracking_uri, self.device = spec, model, tracking_uri, device

    def ready(self) -> bool:
        return True

    def work(self, reports: list[Report]) -> Iterator[Report]:
        for report in reports:
            yield _speed(report, self.spec, self.model, self.tracking_uri, self.device)


def _speed(report: Report, spec: EvaluationSpec, model: str, tracking_uri: str, device: str) -> Report:
    found = LatentZoom.load(str(registry.resolve(model, tracking_uri=tracking_uri)), device=device)
    return with_speed(report, spec, found)


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    started = start_ray()
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()


def _place(num_workers: int, gpus_per_worker: float | None) -> tuple[dict[str, Any], str]:
    """What Ray reserves for each worker, and its device. Waits for a machine that may still come; `UserError` where
    there is no room for one worker, for which Ray would wait without a word."""
    gpus = gpus_of_each(gpus_per_worker, reachable_resources())
    cpus = 1 if gpus else cpus_for_each(machine_cpus(), num_workers)
    await_room(1, cpus, gpus)
    return {"num_cpus": cpus, "num_gpus": gpus}, "cuda" if gpus else "cpu"


def _name(chunk: Chunk) -> str:
    return f"samples {chunk[0]} to {chunk[1] - 1}"


class ChunkActor:
    """A `ChunkWorker` in a process of its own."""

    def __init__(self, spec: EvaluationSpec, model: ModelReference, pictures: Pictures, device: str) -> None:
        self.arguments = spec, model, pictures, device

    def ready(self) -> bool:
        """Find and load the model."""
        import torch

        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        spec, model, pictures, device = self.arguments
        bundle = in_cache(model.digest) or registry.resolve(model.uri, tracking_uri=model.tracking_uri)
        if registry.bundle_digest(bundle) != model.digest:
            raise UserError(f"{model.uri} changed while it was being evaluated; run the same command again")
        teacher = str(registry.resolve(spec.teacher, tracking_uri=model.tracking_uri)) if spec.teacher else ""
        self.worker = ChunkWorker(spec, str(bundle), pictures, device, teacher)
        return True

    def work(self, chunks: list[Chunk]) -> Iterator[tuple[Chunk, Arrays]]:
        for chunk in chunks:
            yield chunk, self.worker.run(*chunk)
