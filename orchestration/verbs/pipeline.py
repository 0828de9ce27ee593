"""`latentzoom pipeline`: images → promoted model as one resumable job. Typed again, it continues."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from orchestration.text_table import text_table
from pipeline import storage
from pipeline.command_line import Device, Flag, Repeated, parse, plain_help
from pipeline.common_options import answer, did_you_mean
from pipeline.errors import UserError, require_range
from pipeline.redact import url_without_secrets

if TYPE_CHECKING:
    from orchestration.chain.job import Chain, Job
    from orchestration.chain.steps import Result, Status
    from training.config import Preset
    from training.evaluation.spec import EvaluationSpec

HELD_OUT = 0.02
"""Fraction held out for evaluation when neither the source nor the command line names a split."""


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Images → shards → autoencoder → latents → decoder → denoiser → align (→ distill) → evaluate → register → promote,
    as one job. Finished steps are skipped; run it again after any interruption."""

    preset: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """As `latentzoom train --help` lists them: debug, ffhq-256, ..."""
    source: Annotated[str, tyro.conf.arg(metavar="KIND")]
    """Kind of image source: folder, ffhq, lsun, ... as `latentzoom preprocess --help` lists them."""
    source_url: Annotated[str, tyro.conf.arg(metavar="URL")]
    """Where the images are."""
    workdir: Annotated[str, tyro.conf.arg(metavar="URL")]
    """Folder for everything the job writes."""
    name: str = ""
    """Registered model; without it the preset's."""
    autoencoder: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """Bundle with an autoencoder: skips training one."""
    init: Annotated[Repeated, tyro.conf.arg(metavar="[PART=]START")] = ()
    """Fine-tune: begin with the parts of this bundle (address, models:/NAME@champion), whose autoencoder is taken as it
    is. PART=START for one part, as in decoder=autoencoder. May be given several times."""
    stages: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME,...")] = ()
    """Train these only, as in decoder,align; the other parts must come from --init or --autoencoder."""
    set: Annotated[Repeated, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of the preset: align.lr=1e-6. May be given several times, as the next two."""
    preprocess: Annotated[Repeated, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of preprocess: val_list=URL."""
    evaluate: Annotated[Repeated, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of evaluate: num=5000."""
    workers: Annotated[str, tyro.conf.arg(metavar="NUM|LEAST:MOST")] = "1"
    """Ray Train workers; a range is elastic."""
    gpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """0: CPUs; without it one where the cluster has GPUs, but latents are encoded on CPUs."""
    preprocess_workers: int | None = None
    """Ray actors that build shards; 0: this process; without it as many as train, on a cluster."""
    evaluate_workers: int | None = None
    """Ray workers that evaluate, and measure a champion anew; 0: this process; without it as many as train, on a
    cluster."""
    local: Flag = False
    """Everything in this process: no Ray, no DeepSpeed."""
    device: Device = ""
    """Of what runs in this process: cpu, cuda, cuda:1; without it CUDA where there is one."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store; without it MLFLOW_TRACKING_URI, else WORKDIR/mlflow.db."""
    retries: int = 1
    """Further attempts of a step that fails in passing."""
    until: Annotated[str, tyro.conf.arg(metavar="STEP")] = ""
    """Stop after this step."""
    from_step: Annotated[str, tyro.conf.arg(name="from", metavar="STEP")] = ""
    """Do this step and what follows anew."""
    dry_run: Flag = False
    """Print what is done, stale or missing, and why."""

    def __post_init__(self) -> None:
        require_range(self, 0, 1000, "gpus_per_worker", "retries")
        require_range(self, 0, 100_000, "preprocess_workers", "evaluate_workers")

    def whole(self) -> dict[str, Any]:
        """All settings of the preset, for --show-config."""
        from training.cli import whole_preset

        return {"set": whole_preset(self.preset, self.set)}


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom pipeline")
    from orchestration.chain.job import Chain, rehearse_stages
    from orchestration.chain.lease import sole_job
    from orchestration.chain.redo import Redo
    from orchestration.chain.run import announcer, run_chain
    from orchestration.chain.steps import statuses
    from orchestration.tracking.outages import patiently

    job = begun(make_job(arguments), list(arguments.init), local=arguments.local or arguments.dry_run)
    redo = Redo.load(job.work)
    Chain(job).require(arguments.from_step)
    asked = redo.ask(arguments.from_step)
    chain = Chain(dataclasses.replace(job, redo=asked.counts))
    steps = chain.until(arguments.until)
    if arguments.from_step and arguments.until and arguments.from_step not in [s.name for s in steps]:
        raise UserError(f"--from {arguments.from_step} comes after --until {arguments.until}")
    if arguments.dry_run:
        known, trouble = statuses(job.work, steps), ""
        try:
            rehearse_stages(job, steps)
        except UserError as error:
            trouble = str(error)
        answer(plan_table(chain, known), {"workdir": job.work, "steps": known, "trouble": trouble})
        if trouble:
            print(f"latentzoom: warning: as it is, this would not begin: {trouble}", file=sys.stderr)
        return 0
    rehearse_stages(job, steps)
    with sole_job(job.work) as chain.still_ours:
        asked.save(job.work)
        results = run_chain(chain, steps, announce=announcer(time.monotonic()), retries=arguments.retries)
        patiently(lambda: asked.close().save(job.work), "pipeline")
    answer(f"{results_table(results)}\n{_after(chain, results)}", {"workdir": job.work, "steps": results})
    return 0


def make_job(arguments: Arguments) -> Job:
    """Everything the command line decides, checked. Raises `UserError`."""
    from orchestration.chain.job import Job
    from orchestration.cluster.devices import check_workers, own_device
    from orchestration.tracking import store as tracking
    from training.cli import parse_workers
    from training.config import override
    from training.presets import get_preset
    from training.starts import address

    preset = override(get_preset(arguments.preset), list(arguments.set))
    work = storage.absolute(arguments.workdir)
    low, high = parse_workers(arguments.workers)
    check_workers("--preprocess-workers", arguments.preprocess_workers or 0)
    check_workers("--evaluate-workers", arguments.evaluate_workers or 0)
    is_local = storage.is_local(work)
    if not (arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or is_local):
        raise UserError(f"--workdir {work} is remote: name the tracking server with --tracking-uri http://HOST:5000")
    return Job(
        work=work,
        model_name=arguments.name or preset.model.name,
        preset=preset,
        preprocess=_preprocess_config(arguments, preset, workers_of(arguments, arguments.preprocess_workers, high)),
        evaluation=override(_evaluation(preset), list(arguments.evaluate)),
        tracking_uri=tracking.tracking_uri(arguments.tracking_uri or None, folder=work if is_local else None),
        autoencoder=address(arguments.autoencoder) if arguments.autoencoder else "",
        stages=arguments.stages,
        local=arguments.local,
        workers=low if low == high else (low, high),
        gpus_per_worker=arguments.gpus_per_worker,
        evaluate_workers=workers_of(arguments, arguments.evaluate_workers, high),
        device=own_device(arguments.device),
    )


def workers_of(arguments: Arguments, asked: int | None, most: int) -> int:
    """Ray workers that build shards or evaluate. On a cluster as many as train, where nothing else was asked for: the
    driver's machine, a head, has no GPU and few CPUs."""
    if arguments.local:
        return 0
    if asked is None:
        return most if os.environ.get("RAY_ADDRESS") else 0
    return int(asked)


def begun(job: Job, inits: list[str], *, local: bool) -> Job:
    """The job with what its stages start from: --init for each part, models:/ addresses pinned and fetched, or where
    not `local` put under the working folder. Raises `UserError`."""
    from orchestration.registry.starts import pinned, pinned_uri, place
    from training.starts import address, with_init, with_whole

    def found(uri: str) -> str:
        return place(pinned_uri(uri, job.tracking_uri), job.work, job.tracking_uri, local=local)

    preset, autoencoder = job.preset, job.autoencoder
    parts = [init for init in inits if init.partition("=")[0].isalpha() and "=" in init]
    for init in (init for init in inits if init not in parts):
        uri = pinned_uri(address(init), job.tracking_uri)
        preset, autoencoder = with_whole(preset, uri, found(uri)), autoencoder or uri
    for init in parts:
        part = init.partition("=")[0]
        preset = with_init(preset, part if part in ("autoencoder", "denoiser") else "decoder", [init])
    preset = pinned(preset, preset.stages, job.tracking_uri)
    return dataclasses.replace(job, preset=preset, autoencoder=found(autoencoder) if autoencoder else "")


def _preprocess_config(arguments: Arguments, preset: Preset, workers: int) -> Any:
    from preprocess.config import PreprocessConfig
    from preprocess.sources import SOURCES
    from training.config import override

    if arguments.source not in SOURCES:
        near = did_you_mean(arguments.source, SOURCES)
        raise UserError(f"unknown source {arguments.source!r}{near}; use one of {', '.join(SOURCES)}")
    model = preset.model
    config = PreprocessConfig(
        source=arguments.source,
        source_url=storage.absolute(arguments.source_url),
        dest="",
        size=model.image_size,
        lr_sizes=(model.lr_size,) if model.lr_size else (),
        condition_resize=model.condition_resize,
        condition_cells="input" if model.task == "direct" else "image",
        device="cuda" if arguments.gpus_per_worker and not arguments.local else arguments.device or "cpu",
        workers=workers,
        gpus_per_worker=1.0 if arguments.gpus_per_worker and workers else 0.0,
    )
    config = override(config, list(arguments.preprocess))
    if model.task == "direct" and preset.uses_latents and not config.lr_sizes:
        raise UserError(
            "decoder.conditions = 'cached' needs the sizes of the inputs: add --preprocess lr_sizes=[32,48,64], or "
            "draw the inputs with --set decoder.conditions=drawn"
        )
    names = [text.partition("=")[0].strip() for text in arguments.preprocess]
    reserved = [
        name
        for name in names
        if name in ("dest", "autoencoder", "source", "source_url", "size", "sizes", "update", "plan")
    ]
    if reserved:
        raise UserError(f"--preprocess {reserved[0]}=... is set by the pipeline; leave it out")
    splits = config.val_fraction or config.val_folder or config.val_list or config.split
    if not splits and config.source in ("folder", "webdataset", "celebahq", "flickr2k"):
        config = config.replace(val_fraction=HELD_OUT)
    return config


def _evaluation(preset: Preset) -> EvaluationSpec:
    """Generation: half, five eighths and three quarters of the trained size, as published for 128, 160 and 192 of 256.
    SR: the trained factor, and two thirds of it; direct SR: whole factors within the trained range."""
    from training.evaluation.spec import EvaluationSpec

    model = preset.model
    if model.task == "sr":
        factor = model.image_size / model.lr_size
        num_steps = None if preset.one_step else 50
        return EvaluationSpec(task="sr", scales=(round(factor * 2 / 3, 3), factor), num_steps=num_steps)
    if model.task == "direct":
        return EvaluationSpec(task="sr", scales=(2.0, 3.0, 4.0), protocols=("rgb", "benchmark"))
    size = model.image_size
    return EvaluationSpec(task="generation", sizes=(size // 2, size * 5 // 8, size * 3 // 4), num_steps=50)


def plan_table(chain: Chain, known: list[Status]) -> str:
    """What is done, stale or missing, why, and where it goes."""
    rows = [("step", "state", "folder", "why")]
    for status in known:
        result = str((status.result or {}).get("metric", ""))
        rows.append((status.name, status.state, f"{status.name}/{status.key[:16]}", status.reason or result))
    num_open = sum(status.state != "done" for status in known)
    return f"{text_table(rows)}\n{num_open} of {len(known)} steps to do in {chain.job.work}"


def results_table(results: dict[str, Result]) -> str:
    """One line a step: seconds and what came out."""
    rows = [(name, f"{r['seconds']:9.1f} s", str(r.get("metric", ""))) for name, r in results.items()]
    return f"\n{text_table(rows, right=(1,))}"


def _after(chain: Chain, results: dict[str, Result]) -> str:
    job = chain.job
    uri = url_without_secrets(job.tracking_uri)
    if "promote" not in results:
        return f"\nresults in {job.work}, runs in {uri}"
    model = f"models:/{job.model_name}@champion"
    verb = (
        "upscale --scale 4 IN OUT"
        if job.preset.model.task != "generation"
        else "generate --size 256x384 --num 4 --out made"
    )
    return f"\nexport MLFLOW_TRACKING_URI={uri}\nlatentzoom {verb} --model {model}"
