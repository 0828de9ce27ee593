"""A candidate judged against the champion on one data set; where reports are missing both are measured now."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestration.registry.promotion import Decision, Rule
from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.registry.versions import Version


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Which candidate is judged, and how models are measured where that is needed.

    name: registered model. candidate: alias or version. data: data set on which both are measured anew; "" takes
    stored reports, or the candidate's data set. workdir: where finished chunks of an evaluation are kept (path or URL).
    workers: Ray workers; 0 works in this process. gpus_per_worker: None is one where the cluster has GPUs.
    device: "" is CUDA where there is one."""

    name: str
    candidate: str = "candidate"
    data: str = ""
    workdir: str = "promotion"
    workers: int = 0
    gpus_per_worker: float | None = None
    device: str = ""


def judge(trial: Trial, tracking_uri: str | None = None, rule: Rule | None = None) -> Decision:
    """Judge the candidate against the champion, and move the alias if it is better. Raises `UserError` where there is
    no such candidate, or nothing to compare by."""
    from orchestration.cluster.devices import worker_gpus
    from orchestration.registry import versions as registry
    from orchestration.tracking import store as tracking

    if trial.workers:
        worker_gpus(trial.device, trial.gpus_per_worker)  # they do not contradict
    uri = tracking.tracking_uri(tracking_uri)
    champion_report, candidate_report = _reports(trial, uri)
    return registry.promote(
        trial.name,
        tracking_uri=uri,
        candidate=trial.candidate,
        rule=rule,
        champion_report=champion_report,
        candidate_report=candidate_report,
    )


def _reports(trial: Trial, uri: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Reports of champion and candidate on one data set. Stored ones are used where they are comparable; otherwise the
    model is evaluated now, with the options of the candidate's report."""
    from orchestration.registry import versions as registry
    from orchestration.registry.promotion import check_comparable
    from training.evaluation.report import PROTOCOL_VERSION

    new = registry.get_version(trial.name, trial.candidate, tracking_uri=uri)
    old = registry.get_version(trial.name, registry.CHAMPION, tracking_uri=uri)
    if new is None or old is None or old.version == new.version:
        return None, None  # the first model, or an error that `promote` words
    candidate, champion = _stored(new, uri), _stored(old, uri)
    like = candidate or champion
    if like is None:
        raise UserError(f"neither {new.uri} nor {old.uri} has a report; register with --report")
    if candidate is None or trial.data or like["protocol_version"] != PROTOCOL_VERSION:
        candidate = _evaluate(new.uri, trial.data or like["data"], like["spec"], trial, uri)
    try:
        if champion is None:
            raise UserError("no report")
        check_comparable(champion, candidate)
    except UserError as reason:
        print(f"evaluating the champion, {old.uri}, anew: {reason}")
        champion = _evaluate(old.uri, candidate["data"], candidate["spec"], trial, uri)
    return champion, candidate


def _stored(version: Version, uri: str) -> dict[str, Any] | None:
    """The report given at registration, None when there is none, or none any more."""
    from orchestration.registry import versions as registry

    try:
        return registry.stored_report(version, tracking_uri=uri)
    except UserError as reason:
        print(f"note: {reason}")
        return None


def _evaluate(model: str, data: str, spec: dict[str, Any], trial: Trial, uri: str) -> dict[str, Any]:
    from orchestration.cluster.devices import own_device, worker_gpus
    from orchestration.evaluation.evaluate import evaluate
    from orchestration.registry import versions as registry
    from pipeline import storage
    from pipeline.config import from_dict
    from training.evaluation.spec import EvaluationSpec, distilled_steps

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
        work_dir=storage.absolute(trial.workdir),
        num_workers=trial.workers,
        gpus_per_worker=worker_gpus(trial.device, trial.gpus_per_worker) if trial.workers else None,
        device=own_device(trial.device),
    )
    return report.to_dict()
