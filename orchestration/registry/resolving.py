"""From any address of a model to a checked bundle on this machine, and to the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.registry.logged_model import BUNDLE_PATH
from orchestration.registry.stored_bundle import bundle_digest, cached, verify_bundle
from orchestration.registry.version import TAG, Version, parse_model_uri, require_version
from orchestration.tracking import local_store
from orchestration.tracking import store as tracking
from pipeline import storage
from pipeline.bundle import UNFINISHED, settled
from pipeline.errors import Missing, UserError
from pipeline.starter import starter_or

if TYPE_CHECKING:
    import torch

    from pipeline.model import LatentZoom


def resolve(uri: str, *, tracking_uri: str | None = None) -> Path:
    """A local, checked bundle folder for a path, an fsspec URL, `models:/NAME@alias`, `models:/NAME/3`, or the starter
    that comes with the package, `starter:faithful` and `starter:sharp`.

    Remote bundles are kept in the cache (LATENTZOOM_CACHE, default ~/.cache/latentzoom) under their digest.
    """
    uri = starter_or(uri)
    if not uri.startswith("models:/"):
        if storage.is_local(uri):
            return settled(uri, lambda: _local(uri))
        try:
            digest = storage.sha256_bytes(storage.read_bytes(storage.join(uri, "config.json")))
        except Missing as error:
            raise UserError(f"no bundle at {uri}: it has no config.json") from error
        return cached(digest, uri, None, "the bundle")
    name, which = parse_model_uri(uri)
    store = tracking.tracking_uri(tracking_uri)
    version = require_version(name, which, store)
    digest = version.tags.get(TAG + "bundle_digest", "")
    if not digest:
        raise UserError(f"{version.uri} holds no bundle; it was not registered by `latentzoom register`")
    return cached(digest, bundle_place(version, store), store, f"the bundle of {version.uri}")


def _local(uri: str) -> Path:
    """A bundle on a local disk where it lies, or a copy of one whose run goes on: a newer one may take its place while
    it is being used."""
    folder = Path(storage.filesystem(uri)[1])
    if verify_bundle(folder).get("meta", {}).get(UNFINISHED) is None:
        return folder
    return cached(bundle_digest(folder), str(folder), None, "the bundle")


def bundle_place(version: Version, store: str) -> str:
    """Where the bundle of a version lies now. `UserError` naming the place where it should be and is not."""
    with tracking.user_errors(store):
        recorded = tracking.client(store).get_logged_model(version.model_id).artifact_location
    place = f"{local_store.artifact_place(store, recorded).rstrip('/')}/{BUNDLE_PATH}"
    local = local_store.local_path(place)
    if local is not None and not (local / "config.json").is_file():
        beside = local_store.database(store)
        moved = f", nor beside {beside}" if beside is not None and not local.is_relative_to(beside.parent) else ""
        todo = "bring its folder back, or restore it from a backup"
        raise UserError(f"the bundle of {version.uri} is lost: there is nothing at {local}{moved}; {todo}")
    return place


def load(uri: str, device: torch.device | str = "cpu", *, tracking_uri: str | None = None) -> LatentZoom:
    """Load a model from a path, an fsspec URL or a registry URI."""
    from pipeline.model import LatentZoom

    return LatentZoom.load(str(resolve(uri, tracking_uri=tracking_uri)), device=device)
