"""Evaluation: chunks of samples, computed here or by Ray workers, resumable, reduced to a report."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping

import numpy as np

from orchestration import registry, tracking
from orchestration.evaluation.chunk import Arrays, ChunkWorker
from orchestration.evaluation.data import Pictures, check_encoder, open_pictures
from orchestration.evaluation.networks import FEATURE_FIGURES, with_found_lpips
from orchestration.evaluation.report import Figure, Report
from orchestration.evaluation.spec import EvaluationSpec, ModelReference, distilled_steps, spec_to_dict
from orchestration.evaluation.store import ChunkStore
from pipeline import storage
from pipeline.errors import UserError
from pipeline.metrics.bootstrap import mean_interval, set_interval
from pipeline.metrics.gaussian import FeatureStatistics, frechet_distance
from pipeline.metrics.kid import kid, polynomial_mmd
from pipeline.metrics.manifold import manifold_samples
from pipeline.progress import Progress
from training.starts import address

PSNR_TEXT = {
    "rgb": "PSNR per 8-bit picture, RGB, no border",
    "benchmark": "PSNR per 8-bit picture, BT.601 luma, border ceil(scale)",
    "div2k": "PSNR per 8-bit picture, RGB, border ceil(scale) + 6",
}


def evaluate(
    model: str,
    data: str,
    spec: EvaluationSpec,
    *,
    tracking_uri: str | None = None,
    work_dir: str | None = None,
    num_workers: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[Report, Arrays]:
    """Evaluate a bundle folder, URL or `models:/` URI on a shard set or folder; returns the report and the pictures.

    work_dir: where finished chunks are kept, so that an interrupted evaluation goes on (none: nothing is kept).
    num_workers: Ray workers; 0 computes in this process. Neither that number nor the batch size changes the figures.
    Raises `UserError` for a damaged bundle and a data set encoded by another encoder. A figure that needs more samples
    than there are is left out, with a note that says how many it needs.
    """
    started = time.monotonic()
    bundle = registry.resolve(model, tracking_uri=tracking_uri)
    config = registry.verify_bundle(bundle)
    pictures = open_pictures(storage.absolute(data), spec.split)
    identity = str(config["autoencoder_identity"])
    check_encoder(data, pictures.encoder_identity, identity)
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
        todo = store.missing()
        done = num - sum(stop - start for start, stop in todo)
        with Progress(f"evaluate {spec.task}", num, "samples", initial=done) if progress else _Silent() as bar:
            here = dataclasses.replace(spec, teacher=address(spec.teacher) if spec.teacher else "")
            for chunk, arrays in _compute(here, reference, str(bundle), pictures, todo, num_workers, device):
                store.write(chunk, arrays)
                bar.update(chunk[1] - chunk[0])
        store.open()
        figures, notes = reduce(spec, store)
        strips = {key: store[key] for key in store if key.startswith("picture|")}
    if spec.teacher:
        notes.append(f"Teacher: {spec.teacher}, {spec.teacher_steps} steps, on the same inputs and noise.")
    if num < spec.num:
        notes.append(f"{spec.num} samples were asked for; the data has {pictures.num}.")
    report = Report(
        task=spec.task,
        model=model,
        model_name=str(config["model"].get("name", "")),
        bundle_digest=digest,
        encoder_identity=identity,
        data=storage.absolute(data),
        data_digest=pictures.digest,
        split=pictures.split,
        sr_mode=spec.sr_mode if spec.task == "sr" else "",
        lr_size=int(config["model"].get("lr_size", 0)),
        num=num,
        seed=spec.seed,
        sampler=spec.sampler_text(is_distilled=own > 0),
        figures=tuple(figures),
        notes=tuple(notes),
        versions=tracking.versions(),
        seconds=round(time.monotonic() - started, 1),
        spec=spec_to_dict(dataclasses.replace(spec, num_steps=asked)),
    )
    return report, strips


def reduce(spec: EvaluationSpec, arrays: Mapping[str, np.ndarray]) -> tuple[list[Figure], list[str]]:
    """Arrays of all samples → figures with intervals, and notes about what could not be measured.

    One array, or one pair of feature arrays, is asked for at a time."""
    from orchestration.evaluation.networks import describe

    protocols, notes = describe(spec)
    figures = []
    for key in arrays:
        kind, *parts = key.split("|")
        if kind == "value":
            figures.append(_mean_figure(parts[0], parts[1], parts[2], arrays[key], protocols, spec.seed))
    for network in FEATURE_FIGURES:
        for key in [k for k in arrays if k.startswith(f"feature|{network}|real|")]:
            setting = key.rsplit("|", 1)[1]
            real, fake = arrays[key], arrays[f"feature|{network}|fake|{setting}"]
            more, why = _feature_figures(network, setting, real, fake, protocols[network], spec)
            figures += more
            notes += [n for n in why if n not in notes]
    return figures, notes


def _mean_figure(
    name: str, method: str, setting: str, values: np.ndarray, protocols: dict[str, str], seed: int
) -> Figure:
    low, high = mean_interval(values, seed=seed)
    if name.startswith("psnr_"):
        protocol = PSNR_TEXT[name.removeprefix("psnr_")]
    elif name == "ssim":
        protocol = "SSIM per 8-bit picture, RGB, Gaussian window 11, sigma 1.5"
    elif name == "selfssim":
        protocol = "SSIM of one latent at two sizes, the larger shrunk (anti-aliased bicubic)"
    else:
        protocol = protocols[name]
    value = float(values.astype(np.float64).mean())
    return Figure(
        name=name, method=method, setting=setting, value=value, low=low, high=high, protocol=protocol, num=len(values)
    )


def _feature_figures(
    network: str, setting: str, real: np.ndarray, fake: np.ndarray, protocol: str, spec: EvaluationSpec
) -> tuple[list[Figure], list[str]]:
    wanted = FEATURE_FIGURES[network]
    if network == "random_vgg":  # stands in only for what has no weights
        wanted = tuple(w for w in wanted if not (spec.inception if w in ("fid", "kid") else spec.vgg16))
    suffix = "_random_vgg" if network == "random_vgg" else ""
    values: dict[str, tuple[float, float | None, float | None]] = {}
    notes: list[str] = []
    if "fid" in wanted:
        try:
            values["fid"] = (_fid(real, fake), *set_interval(_fid, real, fake, num_resamples=10, seed=spec.seed))
        except UserError as error:
            notes.append(f"fid{suffix} is left out: {error}")
    if "kid" in wanted:
        mean, _ = kid(real, fake, seed=spec.seed)
        values["kid"] = (mean, *set_interval(_subset_mmd, real, fake, num_resamples=20, seed=spec.seed))
    if "precision" in wanted:
        try:
            for name, each in manifold_samples(real, fake).items():
                values[name] = (float(each.mean()), *mean_interval(each, seed=spec.seed))
        except UserError as error:
            notes.append(f"precision and recall{suffix} are left out: {error}")
    return [
        Figure(
            name=name + suffix,
            method="ours",
            setting=setting,
            value=value,
            low=low,
            high=high,
            protocol=protocol,
            num=len(fake),
        )
        for name, (value, low, high) in values.items()
    ], notes


def _fid(real: np.ndarray, fake: np.ndarray) -> float:
    return frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(fake))


def _subset_mmd(real: np.ndarray, fake: np.ndarray) -> float:
    return polynomial_mmd(real[:5000], fake[:5000])


def _compute(
    spec: EvaluationSpec,
    model: ModelReference,
    bundle: str,
    pictures: Pictures,
    todo: list[tuple[int, int]],
    num_workers: int,
    device: str,
) -> Iterator[tuple[tuple[int, int], Arrays]]:
    if not todo:
        return
    if num_workers > 0:
        from orchestration.evaluation.on_ray import compute_on_ray

        yield from compute_on_ray(spec, model, pictures, todo, num_workers, device)
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
