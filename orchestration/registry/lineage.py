"""Where a registered model comes from: code, environment, data, encoder, stages, figures and decisions."""

from __future__ import annotations

import json
import time
from typing import Any

from orchestration.registry import champion
from orchestration.registry import versions as registry
from orchestration.registry.model_card import stage_line
from orchestration.registry.version import TAG
from orchestration.registry.versions import Version
from orchestration.tracking import store as tracking
from orchestration.tracking.local_store import artifact_place, local_path
from pipeline.errors import UserError
from pipeline.redact import url_without_secrets

LOST = "LOST"
"""Begins what the registry knows of and the store no longer has."""


def lineage(uri: str, *, tracking_uri: str | None = None) -> dict[str, str]:
    """Field → value for a `models:/` URI, in reading order. A field that nobody recorded says so; none is empty. What
    the store no longer has (a run that was removed, artifacts that are not where they should be) begins with LOST; the
    version's own tags still tell everything else."""
    store = tracking.tracking_uri(tracking_uri)
    name, which = registry.parse_model_uri(uri)
    version = registry.require_version(name, which, store)
    client = tracking.client(store)
    with tracking.user_errors(store):
        found = client.get_model_version(name, version.version)
        aliases = dict(client.get_registered_model(name).aliases)
    tags = version.tags
    report, report_lost = _report(version, store)
    fields = {
        "model": f"{version.uri} of {url_without_secrets(store)}",
        "aliases": ", ".join(a for a, v in aliases.items() if str(v) == version.version) or "none",
        "registered": _time(found.creation_timestamp),
        "logged model": _logged_model(version, store),
        "bundle": _bundle(version, store),
        "bundle sha256": tags.get(TAG + "bundle_digest", ""),
        "bundle source": tags.get(TAG + "bundle_source", ""),
        **_runs(version, store),
        "git commit": tags.get(TAG + "git_commit", ""),
        "lock sha256": tags.get(TAG + "lock_sha256", ""),
        "versions": _plain(tags.get(TAG + "versions")),
        "config": tags.get(TAG + "config", ""),
        "encoder sha256": tags.get(TAG + "encoder_identity", ""),
        "stages": _stages(tags),
        "training data": _data(tags.get(TAG + "dataset_url"), tags.get(TAG + "dataset_digest"), "register with --data"),
        "evaluation data": report_lost
        or (_data(report["data"], report["data_digest"], "") if report else _data(None, None, "--report")),
        "figures": report_lost or _figures(report),
        "promotion": _plain(tags.get(TAG + "promotion")) if TAG + "promotion" in tags else "not judged yet",
        "champion before": _before(tags, is_champion=str(aliases.get(registry.CHAMPION, "")) == version.version),
        "rolled back": tags.get(TAG + "rolled_back") or "never",
        "description": (found.description or "").strip().splitlines()[0] if (found.description or "").strip() else "",
    }
    return {key: value or "not recorded" for key, value in fields.items()}


def is_usable(fields: dict[str, str]) -> bool:
    """Whether the bundle behind a lineage is where the registry says."""
    return not fields["bundle"].startswith(LOST)


def _bundle(version: Version, store: str) -> str:
    try:
        place = registry.bundle_place(version, store)
        local = local_path(place)
        if local is not None and registry.bundle_digest(local) != version.tags.get(TAG + "bundle_digest"):
            return f"{LOST}: {place} is not the bundle that was registered"
        return place
    except UserError as error:
        return f"{LOST}: {error}"


def _logged_model(version: Version, store: str) -> str:
    try:
        with tracking.user_errors(store):
            model = tracking.client(store).get_logged_model(version.model_id)
        return f"{model.model_id} ({artifact_place(store, str(model.artifact_location))})"
    except UserError as error:
        return f"{LOST}: {version.model_id}: {error}"


def _runs(version: Version, store: str) -> dict[str, str]:
    """The run that registered it, and its children."""
    try:
        with tracking.user_errors(store):
            run = tracking.client(store).get_run(version.run_id)
    except UserError as error:
        return {"run": f"{LOST}: {version.run_id}, removed from the store? ({error})", "child runs": "unknown"}
    is_deleted = ", deleted" if run.info.lifecycle_stage == "deleted" else ""
    return {
        "run": f"{run.info.run_name} {run.info.run_id} ({run.info.status}, {_time(run.info.start_time)}{is_deleted})",
        "child runs": _children(store, run.info.experiment_id, run.info.run_id),
    }


def _report(version: Version, store: str) -> tuple[dict[str, Any] | None, str]:
    """The evaluation report, or in words why it is not there any more."""
    try:
        return registry.stored_report(version, tracking_uri=store), ""
    except UserError as error:
        return None, f"{LOST}: {error}"


def _before(tags: dict[str, str], *, is_champion: bool) -> str:
    before = champion.previous(tags, is_champion=is_champion)
    if before is None:
        return "was never champion"
    return f"version {before}" if before else "none, it was the first"


def _stages(tags: dict[str, str]) -> str:
    stages = json.loads(tags.get(TAG + "meta", "{}")).get("stages", {})
    return ", ".join(stage_line(stage, facts) for stage, facts in stages.items())


def _children(store: str, experiment: str, run_id: str) -> str:
    with tracking.user_errors(store):
        runs = tracking.client(store).search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    return ", ".join(f"{r.info.run_name} {r.info.run_id}" for r in reversed(runs)) or "none"


def _data(url: str | None, digest: str | None, hint: str) -> str:
    return f"{url} (sha256 {digest})" if url and digest else f"not recorded; {hint}"


def _figures(report: dict[str, Any] | None) -> str:
    if report is None:
        return "none; register with --report"
    ours = [f for f in report["figures"] if f["method"] == "ours"]
    return ", ".join(f"{f['name']} at {f['setting']} {float(f['value']):.4g}" for f in ours)


def _plain(text: str | None) -> str:
    """JSON object → "key value, key value"."""
    if not text:
        return ""
    values = json.loads(text)
    return ", ".join(f"{k} {v}" for k, v in values.items()) if values else ""


def _time(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds / 1000))
