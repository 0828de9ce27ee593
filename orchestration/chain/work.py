"""What each step of a chain does: shards, training, evaluation, registering, promotion."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from orchestration.chain.steps import Result
from orchestration.cluster.ray_metrics import PreprocessingMetrics
from orchestration.registry import versions as registry
from orchestration.registry.starts import places
from orchestration.tracking import store as tracking
from orchestration.tracking.stage_run import stage_run
from pipeline import storage
from pipeline.config import to_dict
from pipeline.errors import UserError
from pipeline.redact import plain_without_secrets
from preprocess.shards.manifest import load_manifest
from training.config import preset_to_dict
from training.run import TrainResult

if TYPE_CHECKING:
    from orchestration.chain.job import Chain


def shards_step(chain: Chain, name: str, bundle: str | None) -> Result:
    from preprocess.run import preprocess

    job, dest = chain.job, chain.folder(name)
    config = job.preprocess.replace(dest=dest, autoencoder=bundle)
    if job.local:
        config = config.replace(workers=0)
    if bundle is None:  # nothing to encode: CPU workers decode
        config = config.replace(device="cpu", gpus_per_worker=0.0)
    summary = preprocess(config, observe=PreprocessingMetrics())
    splits = load_manifest(dest).splits
    if not splits.get(job.evaluation.split):
        raise UserError(
            f"the images have no split {job.evaluation.split!r} to evaluate on; hold some out with "
            "--preprocess val_fraction=0.02 (or val_folder, val_list)"
        )
    counts = ", ".join(f"{num} {split}" for split, num in splits.items())
    return {
        "metric": f"{counts} in {summary.num_shards} shards",
        "digest": summary.manifest_digest,
        "outputs": [storage.join(dest, "manifest.json")],
    }


def train_step(chain: Chain, stage: str, data: str, bundle: str | None) -> Result:
    job, run_dir = chain.job, chain.folder(stage)
    shards = chain.folder(data)
    found = places(job.preset, stage, job.work, job.tracking_uri, local=job.local)
    where = {"data": shards, "run_dir": run_dir, "bundle": bundle, "places": found}
    parent = parent_run(chain)
    with stage_run(job.tracking_uri, stage, job.preset, data=shards, run_dir=run_dir, parent=parent) as spec:
        result = (_train_locally if job.local else _train_on_ray)(chain, stage, where, spec)
    metric = f"{result.steps} steps, loss {result.first_loss:.4g} → {result.last_loss:.4g}"
    if "psnr" in result.metrics:
        metric += f", {result.metrics['psnr']:.2f} dB"
    return {
        "bundle": result.bundle,
        "run_id": spec["run_id"],
        "first_loss": result.first_loss,
        "last_loss": result.last_loss,
        "num_steps": result.steps,
        "metric": metric,
        "outputs": [storage.join(result.bundle, "config.json")],
    }


def _train_on_ray(chain: Chain, stage: str, where: dict[str, Any], spec: dict[str, Any]) -> TrainResult:
    from orchestration.cluster.ray_train import launch

    job = chain.job
    return launch(
        stage,
        job.preset,
        num_workers=job.workers,
        gpus_per_worker=job.gpus_per_worker,
        reporter_spec=spec,
        still_ours=chain.still_ours,
        **where,
    )


def _train_locally(chain: Chain, stage: str, where: dict[str, Any], spec: dict[str, Any]) -> TrainResult:
    from orchestration.evaluation.early import make_quality
    from orchestration.tracking.mlflow_reporter import MlflowReporter
    from training.cli import train_here

    job = chain.job
    return train_here(
        stage,
        job.preset,
        still_ours=chain.still_ours,
        reporters=[lambda: MlflowReporter(**spec)],
        device=job.device,
        make_quality=make_quality,
        **where,
    )


def parent_run(chain: Chain) -> str:
    """The MLflow run of this job, RUNNING; a continued job finds its own again."""
    job = chain.job
    name = f"pipeline {job.model_name} {chain.keys[chain.names()[-1]][:8]}"
    params = {"preset": preset_to_dict(job.preset), "source": plain_without_secrets(to_dict(job.preprocess))}
    if found := tracking.find_run(job.tracking_uri, name):
        tracking.reopen_run(job.tracking_uri, found)
        return found
    return tracking.start_run(job.tracking_uri, name, params=params)


def evaluate_step(chain: Chain, done: dict[str, Result], last: str, data: str, stages: list[str]) -> Result:
    from orchestration.evaluation.evaluate import evaluate
    from orchestration.evaluation.report_files import log_report, write_report

    job, out = chain.job, chain.folder("evaluate")
    spec = job.evaluation
    if last == "distill":  # beside the model that it learnt from
        teacher = done[stages[-2]]["bundle"] if len(stages) > 1 else job.autoencoder
        spec = dataclasses.replace(spec, teacher=teacher, teacher_steps=job.preset.distill.teacher_steps)
    report, pictures = evaluate(
        done[last]["bundle"],
        chain.folder(data),
        spec,
        tracking_uri=job.tracking_uri,
        work_dir=out,
        num_workers=job.evaluate_workers,
        gpus_per_worker=job.gpus_per_worker,
        device=job.device,
    )
    names = write_report(report, pictures, out)
    log_report(report, names, out, parent_run(chain), tracking_uri=job.tracking_uri)
    ours = [f"{f.name} {f.setting} {f.value:.4g}" for f in report.figures if f.method == "ours"]
    url = storage.join(out, "report.json")
    return {"report": url, "metric": ", ".join(ours[:3]), "outputs": [url]}


def register_step(chain: Chain, done: dict[str, Result], last: str, data: str) -> Result:
    from training.evaluation.report import load_report

    job, bundle = chain.job, done[last]["bundle"]
    report = load_report(done["evaluate"]["report"])
    key = chain.keys["register"]
    found = registry.registered_by(key, job.model_name, tracking_uri=job.tracking_uri)  # and was killed then
    if found is None:
        found = registry.register(
            bundle,
            job.model_name,
            tracking_uri=job.tracking_uri,
            run_id=parent_run(chain),
            report=report.to_dict(),
            dataset=(chain.folder(data), done[data]["digest"]),
            tags={"latentzoom.pipeline": key},
        )
    return {"version": found.version, "metric": f"{found.uri}, alias {registry.CANDIDATE}"}


def promote_step(chain: Chain, done: dict[str, Result]) -> Result:
    from orchestration.registry.judging import Trial, judge

    job, version = chain.job, done["register"]["version"]
    trial = Trial(
        name=job.model_name,
        candidate=version,
        workdir=chain.folder("promote"),
        workers=job.evaluate_workers,
        gpus_per_worker=job.gpus_per_worker if job.evaluate_workers else None,
        device="" if job.evaluate_workers else job.device,
    )
    print(judge(trial, job.tracking_uri).text())
    champion = registry.get_version(job.model_name, registry.CHAMPION, tracking_uri=job.tracking_uri)
    assert champion is not None  # the first model is always promoted
    promoted = champion.version == version
    words = "" if promoted else f"; version {version} was not better by the rule"
    return {
        "promoted": promoted,
        "champion": champion.version,
        "metric": f"champion is version {champion.version}{words}",
    }
