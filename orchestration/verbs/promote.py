"""`latentzoom promote`: the candidate becomes champion if it is better by the written rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from orchestration.cluster.devices import check_workers
from orchestration.registry.judging import Trial, judge
from orchestration.registry.promotion import Rule
from pipeline.command_line import Device, parse, plain_help
from pipeline.common_options import answer
from pipeline.errors import require_range


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Judge a candidate against the champion. Exit status 0: promoted, 1: not promoted."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Registered model."""
    candidate: Annotated[str, tyro.conf.arg(metavar="ALIAS|VERSION")] = "candidate"
    """Alias or version to judge."""
    data: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Evaluate both on this data set, with the options of the candidate's report; without it on its data set."""
    primary: Annotated[str, tyro.conf.arg(metavar="FIGURE")] = "auto"
    """Figure that must be lower beyond doubt; auto: LPIPS for SR, FID or KID for generation."""
    guard_tolerance: float = 0.1
    """How many dB PSNR may be worse."""
    workdir: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "promotion"
    """Where finished chunks of an evaluation are kept (path or URL), so that it continues when it was interrupted."""
    workers: int = 0
    """Ray workers for evaluation; 0 works in this process."""
    gpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """Of each Ray worker; 0: CPUs; without it one where the cluster has GPUs."""
    device: Device = ""
    """cpu, cuda, cuda:1; without it CUDA where there is one. Of workers: as --gpus-per-worker 0 or 1."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store; without it MLFLOW_TRACKING_URI, else ./mlflow.db."""

    def __post_init__(self) -> None:
        require_range(self, 0, 1000, "guard_tolerance", "gpus_per_worker")
        require_range(self, 0, 100_000, "workers")


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom promote")
    check_workers("--workers", arguments.workers)
    trial = Trial(
        name=arguments.name,
        candidate=arguments.candidate,
        data=arguments.data,
        workdir=arguments.workdir,
        workers=arguments.workers,
        gpus_per_worker=arguments.gpus_per_worker,
        device=arguments.device,
    )
    rule = Rule(primary=arguments.primary, guard_tolerance=arguments.guard_tolerance)
    decision = judge(trial, arguments.tracking_uri or None, rule)
    answer(decision.text(), decision)
    return 0 if decision.promote else 1
