"""The model registry: register a bundle, move aliases, find a bundle again.

A version is a LoggedModel (the bundle inside, see `logged_model`) with tags that say where it came from. Aliases:
`candidate` (registered, not judged yet) and `champion` (what people load). An alias moves in one transaction of the
store. The version that was champion before is written on the new champion *before* the alias moves, so a rollback is
possible whatever happens in between.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration import tracking
from orchestration.logged_model import BUNDLE_PATH, log_model
from orchestration.model_card import model_card
from orchestration.promotion import Decision, Rule, decide
from pipeline import storage
from pipeline.bundle import load_bundle
from pipeline.config import to_dict
from pipeline.errors import UserError
from pipeline.starter import starter_or

if TYPE_CHECKING:
    import torch

    from pipeline.model import LatentZoom

CANDIDATE, CHAMPION = "candidate", "champion"
_TAG = "latentzoom."
_ALLOWED = {"config.json", "README.md", "autoencoder.safetensors", "decoder.safetensors", "denoiser.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Version:
    """One registered version."""

    name: str
    version: str
    model_id: str
    run_id: str
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


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
    bundle_url = starter_or(bundle_url)
    with tempfile.TemporaryDirectory(prefix="latentzoom-register-") as temporary:
        folder = _copy_checked(bundle_url, Path(temporary) / "bundle")
        bundle = load_bundle(str(folder))
        config = storage.read_json(str(folder / "config.json"))
        if report is not None and report.get("bundle_digest") not in (None, bundle_digest(folder)):
            raise UserError(f"the report measures another bundle than {bundle_url}; evaluate this one")
        own_run = run_id is None
        run_id = run_id or tracking.start_run(uri, f"register {name}")
        all_tags = _version_tags(config, folder, bundle_url, dataset, report) | dict(tags or {})
        with tracking.user_errors(uri):
            model_id = log_model(
                uri, run_id, folder, bundle, name=name, tags=all_tags, params={"model": to_dict(bundle.config)}
            )
            _log_figures(uri, run_id, model_id, metrics or {}, report, dataset)
            all_tags[_TAG + "model_id"] = model_id
            card = model_card(name, bundle, report, dataset, all_tags)
            version = _create_version(uri, name, model_id, run_id, all_tags, card)
            tracking.client(uri).set_registered_model_alias(name, CANDIDATE, version)
        if own_run:
            tracking.end_run(uri, run_id)
    return Version(name=name, version=version, model_id=model_id, run_id=run_id, tags=all_tags)


def get_version(name: str, which: str, *, tracking_uri: str | None = None) -> Version | None:
    """Version by number or alias; None when there is no such model, version or alias."""
    from mlflow.exceptions import MlflowException

    uri = tracking.tracking_uri(tracking_uri)
    client = tracking.client(uri)
    with tracking.user_errors(uri):
        try:
            found = (
                client.get_model_version(name, which)
                if which.isdigit()
                else client.get_model_version_by_alias(name, which)
            )
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
    return Version(
        name=name,
        version=str(found.version),
        model_id=found.tags.get(_TAG + "model_id", ""),
        run_id=str(found.run_id or ""),
        tags=dict(found.tags),
    )


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
    new = require_version(name, candidate, uri)
    old = get_version(name, CHAMPION, tracking_uri=uri)
    if old is not None and old.version == new.version:
        return Decision(promote=False, rule="", reasons=(f"version {new.version} is the champion already",))
    new_report = candidate_report or stored_report(new, tracking_uri=uri)
    old_report = None
    if old is not None:
        old_report = champion_report or stored_report(old, tracking_uri=uri)
        if old_report is None or new_report is None:
            missing = old if old_report is None else new
            raise UserError(f"{missing.uri} has no evaluation report; run `promote` with --data to evaluate both")
    decision = decide(old_report, new_report or {}, rule)
    with tracking.user_errors(uri):
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        log = {"decision": decision.summary(), "rule": decision.rule, "time": now}
        client.set_model_version_tag(name, new.version, _TAG + "promotion", json.dumps(log))
        if decision.promote:
            _move_champion(uri, name, old, new)
    return decision


def rollback(name: str, *, tracking_uri: str | None = None) -> Version:
    """Give `champion` back to the version that had it before. Returns that version."""
    uri = tracking.tracking_uri(tracking_uri)
    client = tracking.client(uri)
    current = require_version(name, CHAMPION, uri)
    previous = current.tags.get(_TAG + "previous_champion", "")
    if not previous:
        raise UserError(f"{current.uri} was the first champion of {name}; there is nothing to go back to")
    target = require_version(name, previous, uri)
    with tracking.user_errors(uri):
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        client.set_model_version_tag(name, current.version, _TAG + "rolled_back", now)
        client.set_registered_model_alias(name, CHAMPION, target.version)
    return target


def resolve(uri: str, *, tracking_uri: str | None = None) -> Path:
    """A local, checked bundle folder for a path, an fsspec URL, `models:/NAME@alias`, `models:/NAME/3`, or the starter
    that comes with the package, `starter:faithful` and `starter:sharp`.

    Remote bundles are kept in the cache (LATENTZOOM_CACHE, default ~/.cache/latentzoom) under their digest.
    """
    uri = starter_or(uri)
    if not uri.startswith("models:/"):
        if storage.is_local(uri):
            folder = Path(storage.filesystem(uri)[1])
            verify_bundle(folder)
            return folder
        return _cached(storage.sha256_bytes(storage.read_bytes(storage.join(uri, "config.json"))), uri, None)
    name, which = parse_model_uri(uri)
    store = tracking.tracking_uri(tracking_uri)
    version = require_version(name, which, store)
    digest = version.tags.get(_TAG + "bundle_digest", "")
    if not digest:
        raise UserError(f"{version.uri} holds no bundle; it was not registered by `latentzoom register`")
    with tracking.user_errors(store):
        location = tracking.client(store).get_logged_model(version.model_id).artifact_location
    return _cached(digest, f"{location.rstrip('/')}/{BUNDLE_PATH}", store)


def load(uri: str, device: torch.device | str = "cpu", *, tracking_uri: str | None = None) -> LatentZoom:
    """Load a model from a path, an fsspec URL or a registry URI."""
    from pipeline.model import LatentZoom

    return LatentZoom.load(str(resolve(uri, tracking_uri=tracking_uri)), device=device)


def parse_model_uri(uri: str) -> tuple[str, str]:
    """`models:/NAME@alias` → (NAME, alias); `models:/NAME/3` → (NAME, "3")."""
    rest = uri.removeprefix("models:/")
    for separator in ("@", "/"):
        name, found, which = rest.rpartition(separator)
        if found and name and which and "/" not in name and (separator == "@" or which.isdigit()):
            return name, which
    raise UserError(f"{uri} is not a model URI; use models:/NAME@alias or models:/NAME/VERSION")


def bundle_digest(folder: str | Path) -> str:
    """SHA-256 of config.json, which itself lists the SHA-256 of every weight file."""
    return storage.sha256_file(str(Path(folder) / "config.json"))


def verify_bundle(folder: str | Path) -> dict[str, Any]:
    """Check every weight file against config.json without loading it; returns the parsed config.json."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no bundle at {folder}: it has no config.json")
    config = storage.read_json(str(folder / "config.json"))
    files = config.get("files") if isinstance(config, dict) else None
    if not isinstance(files, dict) or not set(files) <= _ALLOWED:
        raise UserError(f"{folder}/config.json does not describe a bundle")
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} is incomplete: {name} is missing")
        if storage.sha256_file(str(folder / name)) != sha256:
            raise UserError(f"{folder}/{name} is damaged: its SHA-256 differs from the one in config.json")
    return config


def stored_report(version: Version, *, tracking_uri: str) -> dict[str, Any] | None:
    """The evaluation report given at registration, or None."""
    path = version.tags.get(_TAG + "report")
    if not path:
        return None
    import mlflow.artifacts

    with tracking.user_errors(tracking_uri), tempfile.TemporaryDirectory() as folder:
        local = mlflow.artifacts.download_artifacts(
            run_id=version.run_id, artifact_path=path, dst_path=folder, tracking_uri=tracking_uri
        )
        report: dict[str, Any] = storage.read_json(local)
    return report


def require_version(name: str, which: str, uri: str) -> Version:
    """Version by number or alias; `UserError` when there is none."""
    version = get_version(name, which, tracking_uri=uri)
    if version is None:
        kind = "version" if which.isdigit() else "alias"
        raise UserError(f"no {kind} {which!r} of model {name!r} in {uri}; see `latentzoom register`")
    return version


def _copy_checked(bundle_url: str, folder: Path) -> Path:
    """A local copy that holds nothing but a bundle's own files: no pickles, no links, no surprises get registered."""
    names = storage.list_files(bundle_url)
    if not names:
        raise UserError(f"no bundle at {bundle_url}: the folder is missing or empty")
    strange = sorted(set(names) - _ALLOWED)
    if strange:
        raise UserError(f"{bundle_url} holds {strange[0]!r}, which no bundle has; nothing was registered")
    folder.mkdir(parents=True)
    source = storage.fetch_dir(bundle_url, folder)
    if source != folder:
        for name in names:
            if (source / name).is_symlink():
                raise UserError(f"{source / name} is a link; a bundle holds plain files only")
            shutil.copyfile(source / name, folder / name)
    verify_bundle(folder)
    return folder


def _cached(digest: str, location: str, store: str | None) -> Path:
    """The bundle with this digest from the cache, downloaded first when it is not there. Always checked."""
    root = Path(os.environ.get("LATENTZOOM_CACHE") or Path.home() / ".cache" / "latentzoom") / "bundles"
    target = root / digest
    if not target.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as temporary:
            folder = Path(temporary) / "bundle"
            _download(location, folder, store)
            if bundle_digest(folder) != digest:
                raise UserError(f"{location}/config.json is damaged: it is not the one that was registered")
            verify_bundle(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    if bundle_digest(target) != digest:
        raise UserError(f"{target} in the cache is damaged; delete this folder and try again")
    verify_bundle(target)
    return target


def _download(location: str, folder: Path, store: str | None) -> None:
    folder.mkdir()
    if store is None:
        storage.fetch_dir(location, folder)
        return
    import mlflow.artifacts

    with tracking.user_errors(store):
        local = mlflow.artifacts.download_artifacts(artifact_uri=location, tracking_uri=store)
    for name in sorted(_ALLOWED):
        if (Path(local) / name).is_file():
            shutil.copyfile(Path(local) / name, folder / name)
    if not (folder / "config.json").is_file():
        raise UserError(f"no bundle at {location}: it has no config.json")


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
        "git_commit": code["git_commit"],
        "lock_sha256": code["lock_sha256"],
        "versions": code["versions"],
    }
    if dataset is not None:
        tags |= {"dataset_url": dataset[0], "dataset_digest": dataset[1]}
    if report is not None:
        tags |= {"report": "evaluation/report.json", "evaluation_digest": str(report.get("data_digest", ""))}
    return {_TAG + key: value for key, value in tags.items() if value}


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
    link = json.dumps([{"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return str(version.version)


def _move_champion(uri: str, name: str, old: Version | None, new: Version) -> None:
    client = tracking.client(uri)
    now = get_version(name, CHAMPION, tracking_uri=uri)
    if (now.version if now else None) != (old.version if old else None):
        raise UserError(f"the champion of {name} changed while it was being judged; run `promote` again")
    client.set_model_version_tag(name, new.version, _TAG + "previous_champion", old.version if old else "")
    client.set_registered_model_alias(name, CHAMPION, new.version)
