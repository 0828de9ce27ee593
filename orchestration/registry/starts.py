"""Registered models as what training starts from: pinned to a version, and put where every worker finds them."""

from __future__ import annotations

from collections.abc import Iterable

from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from pipeline import storage
from training.config import Preset
from training.starts import with_start

_REGISTERED = "models:/"


def pinned(preset: Preset, stages: Iterable[str], tracking_uri: str | None) -> Preset:
    """The preset with models:/NAME@alias in the stages' starts as models:/NAME/VERSION: the alias may move while a run
    is interrupted. Raises `UserError` for what is not registered."""
    for stage in stages:
        for name, uri in _registered(preset, stage):
            preset = with_start(preset, stage, name, pinned_uri(uri, tracking_uri))
    return preset


def pinned_uri(uri: str, tracking_uri: str | None) -> str:
    """models:/NAME@alias → models:/NAME/VERSION; any other address as it is."""
    if not uri.startswith(_REGISTERED):
        return uri
    name, which = registry.parse_model_uri(uri)
    return registry.require_version(name, which, tracking.tracking_uri(tracking_uri)).uri


def places(preset: Preset, stage: str, folder: str, tracking_uri: str | None, *, local: bool) -> dict[str, str]:
    """models:/ address among the stage's starts → where its bundle lies: see `place`."""
    return {uri: place(uri, folder, tracking_uri, local=local) for _, uri in _registered(preset, stage)}


def place(uri: str, folder: str, tracking_uri: str | None, *, local: bool) -> str:
    """The folder of a bundle. A registered one is fetched, and where not `local` copied to `folder`/start, which
    workers on other machines see. Any other address as it is."""
    if not uri.startswith(_REGISTERED):
        return uri
    found = registry.resolve(uri, tracking_uri=tracking_uri)
    if local:
        return str(found)
    shared = storage.join(folder, "start", registry.bundle_digest(found)[:16])
    if not storage.exists(storage.join(shared, "config.json")):
        storage.publish_dir(str(found), shared, last="config.json")
    return shared


def _registered(preset: Preset, stage: str) -> list[tuple[str, str]]:
    settings = vars(preset.stage(stage))
    found = [(name, settings.get(name, "")) for name in ("start", "decoder_start")]
    return [(name, uri) for name, uri in found if uri.startswith(_REGISTERED)]
