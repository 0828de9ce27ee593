"""The model registry: register a bundle, move aliases, find a bundle again.

A version is a LoggedModel (the bundle inside, see `logged_model`) with tags that say where it came from. Aliases:
`candidate` (registered, not judged yet) and `champion` (what people load; how it moves: see `champion`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestration.registry import champion
from orchestration.registry.champion import CHAMPION
from orchestration.registry.logged_model import log_model
from orchestration.registry.model_card import model_card
from orchestration.registry.promotion import Decision, Rule, decide
from orchestration.registry.resolving import bundle_place as bundle_place
from orchestration.registry.resolving import load as load
from orchestration.registry.resolving import resolve as resolve
from orchestration.registry.stored_bundle import bundle_digest as bundle_digest
from orchestration.registry.stored_bundle import copy_checked
from orchestration.registry.stored_bundle import verify_bundle as verify_bundle
from orchestration.registry.stored_report import stored_report as stored_report
from orchestration.registry.version import CANDIDATE as CANDIDATE
from orchestration.registry.version import TAG
from orchestration.registry.version import Version as Version
from orchestration.registry.version import check_name as check_name
from orchestration.registry.version import get_version as get_version
from orchestration.registry.version import parse_model_uri as parse_model_uri
from orchestration.registry.version import require_version as require_version
from orchestration.tracking import local_store
from orchestration.tracking import store as tracking
from pipeline import storage
from pipeline.bundle import load_bundle, missing_parts, settled
from pipeline.config import to_dict
from pipeline.errors import UserError
from pipeline.starter import starter_or


def register(
    bundle_url: str,
    name: str,
    *,
    tracking_uri: str | None = None,
    run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    report: Mapping[str, Any] | None = None,
    dataset: tuple[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Version:
    """Register the bundle at `bundle_url` as a new version of `name` with alias `candidate`.

    run_id: the run that made it (a run named "register" is created when None). report: an evaluation report
    (`Report.to_dict()`); its figures become metrics of run and model, linked to the data, and `promote` weighs them.
    dataset: (url, manifest digest) the model was trained on. Nothing is registered when the bundle is damaged.
    """
    uri = tracking.tracking_uri(tracking_uri)
    check_name(name)
    bundle_url = starter_or(bundle_url)
    with tempfile.TemporaryDirectory(prefix="latentzoom-register-") as temporary:
        folder = settled(bundle_url, lambda: _fresh_copy(bundle_url, Path(temporary)))
        bundle = load_bundle(str(folder))
        config = storage.read_json(str(folder / "config.json"))
        if report is not None and report.get("bundle_digest") not in (None, bundle_digest(folder)):
            raise UserError(f"the report measures another bundle than {bundle_url}; evaluate this one")
        all_tags = _version_tags(config, folder, bundle_url, dataset, report) | dict(tags or {})
        with _run_of(uri, name, run_id) as own_run, tracking.user_errors(uri):
            params = {"model": to_dict(bundle.config)}
            model_id = log_model(uri, own_run, folder, bundle, name=name, tags=all_tags, params=params, report=report)
            try:
                _log_figures(uri, own_run, model_id, metrics or {}, report, dataset)
                all_tags[TAG + "model_id"] = model_id
                card = model_card(name, bundle, report, dataset, all_tags)
                version = _create_version(uri, name, model_id, own_run, all_tags, card)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to show
                    if not _tagged(uri, name, "model_id", model_id):  # the version may be there all the same
                        tracking.client(uri).delete_logged_model(model_id)
                raise
    return Version(name=name, version=version, model_id=model_id, run_id=own_run, tags=all_tags)


def _fresh_copy(bundle_url: str, scratch: Path) -> Path:
    shutil.rmtree(scratch / "bundle", ignore_errors=True)
    return copy_checked(bundle_url, scratch / "bundle")


@contextlib.contextmanager
def _run_of(uri: str, name: str, run_id: str | None) -> Iterator[str]:
    """The run `run_id`, or one of its own that ends with the block."""
    if run_id is not None:
        tracking.make_store(uri)
        yield run_id
        return
    own = tracking.start_run(uri, f"register {name}")
    try:
        yield own
    except BaseException:
        with contextlib.suppress(UserError):
            tracking.end_run(uri, own, "FAILED")
        raise
    tracking.end_run(uri, own)


def registered_by(job: str, name: str, *, tracking_uri: str) -> Version | None:
    """The version that an interrupted job of this key has registered already, now with alias `candidate`; None when it
    did not come so far."""
    for number in _tagged(tracking_uri, name, "pipeline", job):
        found = require_version(name, number, tracking_uri)
        with tracking.user_errors(tracking_uri):
            _made_candidate(tracking_uri, name, found.model_id, number)
        return found
    return None


def _tagged(uri: str, name: str, tag: str, value: str) -> list[str]:
    """Numbers of the versions with this tag, the first one first."""
    conditions = f"{tracking.equals('name', name)} and {tracking.equals(f'tags.`{TAG}{tag}`', value)}"
    with tracking.user_errors(uri):
        found = tracking.client(uri).search_model_versions(conditions, max_results=1000)
    same = [v for v in found if v.name == name and v.tags.get(TAG + tag) == value]
    return sorted((str(v.version) for v in same), key=int)


def promote(
    name: str,
    *,
    tracking_uri: str | None = None,
    candidate: str = CANDIDATE,
    rule: Rule | None = None,
    champion_report: Mapping[str, Any] | None = None,
    candidate_report: Mapping[str, Any] | None = None,
) -> Decision:
    """Judge the candidate against the champion and move `champion` if the rule holds. With no champion it moves.

    Reports default to those stored at registration. The decision is written on the candidate's version either way.
    """
    uri = tracking.tracking_uri(tracking_uri)
    client = tracking.client(uri)
    local_store.require_writable(uri)
    new = require_version(name, candidate, uri)
    old = get_version(name, CHAMPION, tracking_uri=uri)
    if old is not None and old.version == new.version:
        with tracking.user_errors(uri):
            champion.finish(uri, name)
        return Decision(promote=False, rule="", reasons=(f"version {new.version} is the champion already",))
    new_report = candidate_report or stored_report(new, tracking_uri=uri)
    old_report = None
    if old is not None:
        old_report = champion_report or stored_report(old, tracking_uri=uri)
        if old_report is None or new_report is None:
            missing = old if old_report is None else new
            raise UserError(f"{missing.uri} has no evaluation report; run `promote` with --data to evaluate both")
    for version, report in ((old, old_report), (new, new_report)):
        measured = (report or {}).get("bundle_digest")
        if version is not None and measured not in (None, version.tags.get(TAG + "bundle_digest")):
            raise UserError(f"{version.uri} is not what was measured, an alias of {name} moved; run `promote` again")
    _require_usable(new, uri)
    decision = decide(old_report, new_report or {}, rule)
    with tracking.user_errors(uri):
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        log = {"decision": decision.summary(), "rule": decision.rule, "time": now}
        if not decision.promote:
            client.set_model_version_tag(name, new.version, TAG + "promotion", json.dumps(log))
            return decision
        with champion.moving(uri, name):
            now_champion = get_version(name, CHAMPION, tracking_uri=uri)
            if (now_champion.version if now_champion else None) != (old.version if old else None):
                raise UserError(f"the champion of {name} changed while it was being judged; run `promote` again")
            if now_champion:
                champion.settle(uri, name, now_champion.version, now_champion.tags)
            client.set_model_version_tag(name, new.version, TAG + "promotion", json.dumps(log))
            champion.move(uri, name, old.version if old else "", new.version)
    return decision


def rollback(name: str, *, tracking_uri: str | None = None) -> Version:
    """Give `champion` back to the version that had it before. Returns that version."""
    uri = tracking.tracking_uri(tracking_uri)
    client = tracking.client(uri)
    local_store.require_writable(uri)
    current = require_version(name, CHAMPION, uri)
    previous = champion.previous(current.tags, is_champion=True)
    if not previous:
        raise UserError(f"{current.uri} was the first champion of {name}; there is nothing to go back to")
    target = require_version(name, previous, uri)
    _require_usable(target, uri)
    with tracking.user_errors(uri), champion.moving(uri, name):
        if require_version(name, CHAMPION, uri).version != current.version:
            raise UserError(f"the champion of {name} changed just now; look at it, and run `rollback` again")
        champion.settle(uri, name, current.version, current.tags)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        client.set_model_version_tag(name, current.version, TAG + "rolled_back", now)
        champion.move_back(uri, name, target.version)
    return target


def _require_usable(version: Version, uri: str) -> None:
    """`UserError` unless the bundle of `version` is there, undamaged, and has the parts that its users need."""
    folder = resolve(version.uri, tracking_uri=uri)
    config = storage.read_json(str(folder / "config.json"))
    parts = [file.removesuffix(".safetensors") for file in config["files"]]
    missing = missing_parts(str(config["model"].get("task")), parts)
    if missing:
        raise UserError(
            f"{version.uri} cannot be champion: its bundle has no {' and no '.join(missing)}, so nobody could use it; "
            "train what is missing and register the whole bundle"
        )


def _version_tags(
    config: Mapping[str, Any],
    folder: Path,
    bundle_url: str,
    dataset: tuple[str, str] | None,
    report: Mapping[str, Any] | None,
) -> dict[str, str]:
    code = tracking.provenance()
    meta = dict(config.get("meta") or {})
    tags = {
        "bundle_digest": bundle_digest(folder),
        "bundle_source": storage.absolute(bundle_url),
        "encoder_identity": str(config["autoencoder_identity"]),
        "config": json.dumps(config["model"], sort_keys=True),
        "meta": json.dumps(meta, sort_keys=True),
        "task": str(config["model"].get("task", "")),
        "parts": ", ".join(sorted(name.removesuffix(".safetensors") for name in config["files"])),
        "git_commit": code["git_commit"],
        "lock_sha256": code["lock_sha256"],
        "versions": code["versions"],
    }
    if dataset is not None:
        tags |= {"dataset_url": dataset[0], "dataset_digest": dataset[1]}
    if report is not None:
        tags |= {"report": "evaluation/report.json", "evaluation_digest": str(report.get("data_digest", ""))}
    return {TAG + key: value for key, value in tags.items() if value}


def _log_figures(
    uri: str,
    run_id: str,
    model_id: str,
    metrics: Mapping[str, float],
    report: Mapping[str, Any] | None,
    dataset: tuple[str, str] | None,
) -> None:
    if dataset is not None:
        tracking.log_dataset(uri, run_id, dataset[0], dataset[1], context="training")
    tracking.log_metrics(uri, run_id, metrics, model_id=model_id)
    if report is None:
        return
    data = str(report["data"])
    tracking.log_dataset(uri, run_id, data, str(report["data_digest"]), context="evaluation")
    values = {f"{f['name']}/{f['setting']}": f["value"] for f in report["figures"] if f["method"] == "ours"}
    link = (data.rstrip("/").rsplit("/", 1)[-1], tracking.short_digest(str(report["data_digest"])))
    tracking.log_metrics(uri, run_id, values, model_id=model_id, dataset=link)
    tracking.client(uri).log_dict(run_id, dict(report), "evaluation/report.json")


def _create_version(uri: str, name: str, model_id: str, run_id: str, tags: Mapping[str, str], description: str) -> str:
    from mlflow.exceptions import MlflowException

    client = tracking.client(uri)
    try:
        client.create_registered_model(name, description="Images at any size: a latentzoom model.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with tracking.as_default(uri):
        version = client.create_model_version(
            name, f"models:/{model_id}", run_id, tags=dict(tags), description=description, model_id=model_id
        )
    return _made_candidate(uri, name, model_id, str(version.version))


def _made_candidate(uri: str, name: str, model_id: str, version: str) -> str:
    """Give the version of a logged model its alias and its link → its number. There may be several: MLflow's client
    asks again when an answer is lost, and each time that it was heard there is one more. The first one stays."""
    client = tracking.client(uri)
    first, *again = _tagged(uri, name, "model_id", model_id) or [version]
    for twin in again:
        client.delete_model_version(name, twin)
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": first}])})
    client.set_registered_model_alias(name, CANDIDATE, first)
    return first
