"""Evaluation: chunks of samples, computed here or by Ray workers, resumable, reduced to a report."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator

from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from orchestration.tracking.outages import patiently
from pipeline import storage
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.redact import clean, plain_without_secrets
from training.evaluation.chunk import Arrays, ChunkWorker
from training.evaluation.data import Pictures, open_pictures
from training.evaluation.networks import with_found_lpips
from training.evaluation.published import KNOWN_BY_KIND
from training.evaluation.reduce import reduce
from training.evaluation.report import Report
from training.evaluation.spec import EvaluationSpec, ModelReference, distilled_steps, spec_to_dict
from training.evaluation.store import ChunkStore
from training.starts import address


def evaluate(
    model: str,
    data: str,
    spec: EvaluationSpec,
    *,
    tracking_uri: str | None = None,
    work_dir: str | None = None,
    num_workers: int = 0,
    gpus_per_worker: float | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[Report, Arrays]:
    """Evaluate a bundle folder, URL or `models:/` URI on a shard set or folder; returns the report and the pictures.

    work_dir: where finished chunks are kept, so that an interrupted evaluation goes on (none: nothing is kept).
    num_workers: Ray workers; 0 computes in this process, on `device`. gpus_per_worker: of each Ray worker, 0 for CPUs;
    None: one where the cluster has GPUs, whatever this machine has. Neither the number of workers nor the batch size
    changes the figures. Raises `UserError` for a damaged bundle. A figure that needs more samples than there are is
    left out, with a note that says how many it needs.
    """
    started = time.monotonic()
    bundle = registry.resolve(model, tracking_uri=tracking_uri)
    config = registry.verify_bundle(bundle)
    pictures = open_pictures(storage.absolute(data), spec.split)
    identity = str(config["autoencoder_identity"])
    if spec.task == "sr" and spec.sr_mode == "auto":
        fixed_input = bool(pictures.split) and config["model"].get("task") != "direct"  # which has no size of its own
        spec = dataclasses.replace(spec, sr_mode="fixed-input" if fixed_input else "fixed-truth")
    spec = with_found_lpips(spec)
    asked, own = spec.num_steps, distilled_steps(config)
    if own and asked not in (None, 0, own):
        raise UserError(f"num_steps = {asked} is not allowed: {model} was distilled to {own} step; leave it out")
    spec = dataclasses.replace(spec, num_steps=(own or 20) if asked is None else asked)
    teacher = None
    if spec.teacher:
        teacher = registry.resolve(spec.teacher, tracking_uri=tracking_uri)
        teacher_config = registry.verify_bundle(teacher)
        if teacher_config["model"].get("lr_size") != config["model"].get("lr_size"):
            raise UserError(f"the teacher {spec.teacher} is for other inputs than {model}; give the one it learnt from")
    digest = registry.bundle_digest(bundle)
    reference = ModelReference(
        uri=address(model),
        tracking_uri=tracking.tracking_uri(tracking_uri),
        digest=digest,
    )
    num = min(spec.num, pictures.num)
    chunks = [(start, min(start + spec.chunk_size, num)) for start in range(0, num, spec.chunk_size)]
    with tempfile.TemporaryDirectory(prefix="latentzoom-evaluate-") as scratch:
        fingerprint = spec.fingerprint(digest, pictures.digest, registry.bundle_digest(teacher) if teacher else "")
        folder = storage.join(work_dir or scratch, "chunks", fingerprint[:16])
        store = ChunkStore(folder, chunks, storage.join(scratch, "copies"))
        here = dataclasses.replace(spec, teacher=address(spec.teacher) if spec.teacher else "")
        workers = (num_workers, gpus_per_worker)
        done = num - sum(stop - start for start, stop in store.missing())
        with Progress(f"evaluate {spec.task}", num, "samples", initial=done) if progress else _Silent() as bar:

            def compute() -> None:
                todo = store.missing()
                for chunk, arrays in _compute(here, reference, str(bundle), pictures, todo, workers, device):
                    store.write(chunk, arrays)
                    bar.update(chunk[1] - chunk[0])

            patiently(compute, "evaluate")
        store.open()
        figures, notes = reduce(spec, store)
        strips = {key: store[key] for key in store if key.startswith("picture|")}
    if spec.teacher:
        notes.append(f"Teacher: {spec.teacher}, {spec.teacher_steps} steps, on the same inputs and noise.")
    if num < spec.num:
        notes.append(f"{spec.num} samples were asked for; the data has {pictures.num}.")
    report = Report(
        task=spec.task,
        model=clean(model),
        model_name=str(config["model"].get("name", "")),
        bundle_digest=digest,
        encoder_identity=identity,
        data=clean(storage.absolute(data)),
        data_digest=pictures.digest,
        split=pictures.split,
        dataset=spec.dataset or KNOWN_BY_KIND.get(pictures.kind, ""),
        sr_mode=spec.sr_mode if spec.task == "sr" else "",
        lr_size=int(config["model"].get("lr_size", 0)),
        num=num,
        seed=spec.seed,
        sampler=spec.sampler_text(is_distilled=own > 0),
        figures=tuple(figures),
        notes=tuple(clean(note) for note in notes),
        versions=tracking.versions(),
        seconds=round(time.monotonic() - started, 1),
        spec=plain_without_secrets(spec_to_dict(dataclasses.replace(spec, num_steps=asked))),
    )
    return report, strips


def _compute(
    spec: EvaluationSpec,
    model: ModelReference,
    bundle: str,
    pictures: Pictures,
    todo: list[tuple[int, int]],
    workers: tuple[int, float | None],
    device: str,
) -> Iterator[tuple[tuple[int, int], Arrays]]:
    if not todo:
        return
    if workers[0] > 0:
        from orchestration.evaluation.on_ray import compute_on_ray

        yield from compute_on_ray(spec, model, pictures, todo, *workers)
        return
    teacher = str(registry.resolve(spec.teacher, tracking_uri=model.tracking_uri)) if spec.teacher else ""
    worker = ChunkWorker(spec, bundle, pictures, device, teacher)
    for chunk in todo:
        yield chunk, worker.run(*chunk)


class _Silent:
    def update(self, num: int = 1, note: str = "") -> None: ...

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...
