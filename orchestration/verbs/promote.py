"""`latentzoom promote`: the candidate becomes champion if it is better by the written rule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from orchestration.promotion import Rule
from pipeline.command_line import Device, parse, plain_help
from pipeline.common_options import answer
from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.registry import Version


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


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom promote")
    from orchestration import registry, tracking
    from orchestration.devices import worker_gpus

    if arguments.workers:
        worker_gpus(arguments.device, arguments.gpus_per_worker)  # they do not contradict
    uri = tracking.tracking_uri(arguments.tracking_uri or None)
    champion_report, candidate_report = _reports(arguments, uri)
    decision = registry.promote(
        arguments.name,
        tracking_uri=uri,
        candidate=arguments.candidate,
        rule=Rule(primary=arguments.primary, guard_tolerance=arguments.guard_tolerance),
        champion_report=champion_report,
        candidate_report=candidate_report,
    )
    lines = [f"rule: {decision.rule}", *(f"  {reason}" for reason in decision.reasons)]
    answer("\n".join([*lines, "promoted" if decision.promote else "not promoted"]), decision)
    return 0 if decision.promote else 1


def _reports(arguments: Arguments, uri: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Reports of champion and candidate on one data set. Stored ones are used where they are comparable; otherwise the
    model is evaluated now, with the options of the candidate's report."""
    from orchestration import registry
    from orchestration.evaluation.report import PROTOCOL_VERSION
    from orchestration.promotion import check_comparable

    new = registry.get_version(arguments.name, arguments.candidate, tracking_uri=uri)
    old = registry.get_version(arguments.name, registry.CHAMPION, tracking_uri=uri)
    if new is None or old is None or old.version == new.version:
        return None, None  # the first model, or an error that `promote` words
    candidate, champion = _stored(new, uri), _stored(old, uri)
    like = candidate or champion
    if like is None:
        raise UserError(f"neither {new.uri} nor {old.uri} has a report; register with --report")
    if candidate is None or arguments.data or like["protocol_version"] != PROTOCOL_VERSION:
        candidate = _evaluate(new.uri, arguments.data or like["data"], like["spec"], arguments, uri)
    try:
        if champion is None:
            raise UserError("no report")
        check_comparable(champion, candidate)
    except UserError as reason:
        print(f"evaluating the champion, {old.uri}, anew: {reason}")
        champion = _evaluate(old.uri, candidate["data"], candidate["spec"], arguments, uri)
    return champion, candidate


def _stored(version: Version, uri: str) -> dict[str, Any] | None:
    """The report given at registration, None when there is none, or none any more."""
    from orchestration import registry

    try:
        return registry.stored_report(version, tracking_uri=uri)
    except UserError as reason:
        print(f"note: {reason}")
        return None


def _evaluate(model: str, data: str, spec: dict[str, Any], arguments: Arguments, uri: str) -> dict[str, Any]:
    from orchestration import registry
    from orchestration.devices import own_device, worker_gpus
    from orchestration.evaluation.evaluate import evaluate
    from orchestration.evaluation.spec import EvaluationSpec, distilled_steps
    from pipeline import storage
    from pipeline.config import from_dict

    known = {f.name for f in dataclasses.fields(EvaluationSpec)}
    options = from_dict(EvaluationSpec, {k: v for k, v in spec.items() if k in known}, "report")
    bundle = registry.verify_bundle(registry.resolve(model, tracking_uri=uri))
    if distilled_steps(bundle) and options.num_steps:
        options = dataclasses.replace(options, num_steps=None)  # a distilled model has one number of steps
    report, _ = evaluate(
        model,
        data,
        options,
        tracking_uri=uri,
        work_dir=storage.absolute(arguments.workdir),
        num_workers=arguments.workers,
        gpus_per_worker=worker_gpus(arguments.device, arguments.gpus_per_worker) if arguments.workers else None,
        device=own_device(arguments.device),
    )
    return report.to_dict()
