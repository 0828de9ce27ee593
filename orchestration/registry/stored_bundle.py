"""Bundles on disk as the registry handles them: checked file by file, copied without surprises, kept in the cache."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from orchestration.tracking import local_store
from orchestration.tracking import store as tracking
from pipeline import storage
from pipeline.bundle import FILES, read_config
from pipeline.errors import UserError, first_line
from pipeline.importing.content import impostor
from pipeline.storage import cache_folder


def bundle_digest(folder: str | Path) -> str:
    """SHA-256 of config.json, which itself lists the SHA-256 of every weight file."""
    return storage.sha256_file(str(Path(folder) / "config.json"))


def verify_bundle(folder: str | Path) -> dict[str, Any]:
    """Check every weight file against config.json without loading it; returns the parsed config.json."""
    folder = Path(folder)
    config = read_config(str(folder))
    files = config.get("files") if isinstance(config, dict) else None
    if not isinstance(files, dict) or not set(files) <= FILES:
        raise UserError(f"{folder}/config.json does not describe a bundle")
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} is incomplete: {name} is missing")
        if storage.sha256_file(str(folder / name)) != sha256:
            if words := impostor(storage.read_head(str(folder / name), 1024)):
                raise UserError(f"{folder / name} is {words}")
            raise UserError(f"{folder}/{name} is damaged: its SHA-256 differs from the one in config.json")
    return config


def copy_checked(bundle_url: str, folder: Path) -> Path:
    """A local copy that holds nothing but a bundle's own files: no pickles, no links, no surprises get registered."""
    names = storage.list_files(bundle_url)
    if not names:
        raise UserError(f"no bundle at {bundle_url}: the folder is missing or empty")
    strange = sorted(set(names) - FILES)
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


def cached(digest: str, location: str, store: str | None, what: str) -> Path:
    """The bundle with this digest from the cache, fetched first from `location` when it is not there. Always checked.

    store: the tracking store that keeps it; None: `location` is an fsspec URL. what: its name in messages. Where the
    cache cannot be written, a bundle on a local disk is used where it lies."""
    root = cache_folder() / "bundles"
    target = root / digest
    try:
        is_there = target.is_dir()
    except PermissionError:  # a cache of somebody else's
        is_there = False
    if not is_there:
        try:
            root.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".download-", dir=root)
        except OSError as error:
            there = local_store.local_path(location)
            if there is not None and there.is_dir():
                return _checked(there, digest, f"{there}/config.json is damaged: it is not the one that was registered")
            raise UserError(f"cannot write to the cache {root}: {error.strerror}; set LATENTZOOM_CACHE") from error
        with scratch as temporary:
            folder = Path(temporary) / "bundle"
            _fetch(location, folder, store, what)
            _checked(folder, digest, f"{location}/config.json is damaged: it is not the one that was registered")
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    return _checked(target, digest, f"{target} in the cache is damaged; delete this folder and try again")


def in_cache(digest: str) -> Path | None:
    """The bundle with this digest where this machine's cache has it: one of a run that goes on lies nowhere else."""
    folder = cache_folder() / "bundles" / digest
    try:
        return _checked(folder, digest, "another bundle")
    except (UserError, OSError):
        return None


def _checked(folder: Path, digest: str, complaint: str) -> Path:
    if not (folder / "config.json").is_file():
        raise UserError(f"no bundle at {folder}: it has no config.json")
    if bundle_digest(folder) != digest:
        raise UserError(complaint)
    verify_bundle(folder)
    return folder


def _fetch(location: str, folder: Path, store: str | None, what: str) -> None:
    folder.mkdir()
    if store is None:
        _fetch_named(location, folder)
        return
    local = local_store.local_path(location) or _downloaded(location, store, what, folder.parent / "download")
    for name in sorted(FILES):
        if (local / name).is_file():
            shutil.copyfile(local / name, folder / name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} is lost: the store says that it is at {location}, and no bundle is there")


def _fetch_named(url: str, folder: Path) -> None:
    """The files that config.json names, one by one: many web servers list no folders."""
    config = read_config(url)
    (folder / "config.json").write_bytes(storage.read_bytes(storage.join(url, "config.json")))
    files = config.get("files") if isinstance(config, dict) else None
    if not isinstance(files, dict) or not set(files) <= FILES:
        raise UserError(f"{url}/config.json does not describe a bundle")
    for name in files:
        storage.fetch_file(storage.join(url, name), folder / name)
    with contextlib.suppress(UserError):  # a card may be missing; some stores answer "forbidden" then
        (folder / "README.md").write_bytes(storage.read_bytes(storage.join(url, "README.md")))


def _downloaded(location: str, store: str, what: str, folder: Path) -> Path:
    """A copy in `folder` of what lies in an object store or behind a server."""
    import mlflow.artifacts

    folder.mkdir()
    try:
        with tracking.user_errors(store):
            return Path(
                mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(folder), tracking_uri=store)
            )
    except UserError as error:
        raise UserError(f"{what} cannot be fetched from {location}: {first_line(error)}") from error
