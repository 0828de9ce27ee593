"""The way to a tracking store: its address, clients for it, and nothing secret on the way there."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.tracking.local_store import (
    SQLITE,
    check_makeable,
    database,
    follow_move,
    require_file,
    require_store,
)
from orchestration.tracking.store_errors import StoreSilent, user_errors
from pipeline.common_options import note
from pipeline.errors import UserError, first_line
from pipeline.redact import plain_without_secrets, url_without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient


EXPERIMENT = "latentzoom"
_SERVED = ("http", "https", "sqlite", "databricks", "databricks-uc", "uc")
_USUAL = "sqlite:///path/mlflow.db or http://host:port"
_WRITES = (
    "create_run",
    "set_tag",
    "log_dict",
    "create_logged_model",
    "set_logged_model_tags",
    "create_registered_model",
    "create_model_version",
    "set_model_version_tag",
)
"""What sends texts to a store. Parameters and data sets, which are objects, are cleaned where they are made."""


def tracking_uri(uri: str | None = None, folder: str | Path | None = None) -> str:
    """The tracking URI to use: `uri`, else MLFLOW_TRACKING_URI, else SQLite in `folder` (default: working folder).

    SQLite paths are made absolute, because workers run in another folder. A bare folder or `file:` URI is refused:
    MLflow's file store cannot hold a model registry. So is what nothing here can open.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    if not uri:
        return SQLITE + str(Path(folder or ".").resolve() / "mlflow.db")
    if uri.startswith(SQLITE):
        return SQLITE + str(Path(uri[len(SQLITE) :]).resolve())
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(f"tracking URI {uri!r} has no registry; use {_USUAL}")
    if uri.partition("://")[0] not in _SERVED:
        _check_driver(uri)
    return uri


def _check_driver(uri: str) -> None:
    """`UserError` where `uri` is no data base, or its driver is not installed: no waiting mends that."""
    import sqlalchemy
    import sqlalchemy.exc

    try:
        sqlalchemy.make_url(uri).get_dialect().import_dbapi()
    except (sqlalchemy.exc.ArgumentError, ImportError, ValueError) as error:
        shown = url_without_secrets(uri)
        raise UserError(f"cannot use the tracking URI {shown}: {first_line(error)}; use {_USUAL}") from error


def client(uri: str) -> MlflowClient:
    """An MLflow client for `uri` (tracking and registry), to read and to write. A SQLite store must be there: only
    `make_store` makes one, so a mistyped address is an error and not a new, empty store."""
    require_file(uri)
    return _client(uri)


def make_store(uri: str) -> MlflowClient:
    """As `client`, before the first run is written: a SQLite store is made if missing, and one that was moved is told
    where its artifacts are now."""
    file = database(uri)
    if file is not None:
        check_makeable(uri)
        with _alone_in(file.parent), user_errors(uri):  # of two processes that make the tables at once one would fail
            _opened(uri)
            old = follow_move(uri)
        if old is not None:
            note(f"note: {file} was moved or copied; its records no longer point to {old}")
    return _client(uri)


@functools.lru_cache(maxsize=16)
def _client(uri: str) -> MlflowClient:
    file = database(uri)
    if file is not None:
        with _alone_in(file.parent), user_errors(uri):
            require_store(uri)
            return _opened(uri)
    if uri.startswith(("http://", "https://")):
        _greet(uri)
    with user_errors(uri):
        return _opened(uri)


def _opened(uri: str) -> MlflowClient:
    _quiet()
    from mlflow import MlflowClient

    made = MlflowClient(tracking_uri=uri, registry_uri=uri)
    for name in _WRITES:
        setattr(made, name, _cleaned(getattr(made, name)))
    if uri.startswith(SQLITE):
        made.get_experiment_by_name(EXPERIMENT)  # MLflow opens, and makes, a data base on first use
    return made


def _cleaned(write: Callable[..., Any]) -> Callable[..., Any]:
    """As `write`, with every text in its arguments cleaned: nothing secret is sent to a store."""

    @functools.wraps(write)
    def send(*arguments: Any, **options: Any) -> Any:
        return write(*plain_without_secrets(arguments), **plain_without_secrets(options))

    return send


def _greet(uri: str) -> None:
    """Raise `StoreError` soon when nobody answers at `uri`: MLflow itself tries for minutes. Any answer will do."""
    import requests

    for pause in (1.0, 2.0, None):
        try:
            requests.get(uri.rstrip("/") + "/health", timeout=10)
            return
        except requests.exceptions.RequestException as error:
            if pause is None:
                raise StoreSilent(
                    f"cannot reach the tracking server {url_without_secrets(uri)}: is it running there?"
                ) from error
            time.sleep(pause)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for other processes in the same block. The lock is the folder's own, which filelock has none of: no
    file, and a kill releases it."""
    handle = -1
    try:
        with contextlib.suppress(OSError):  # not to be listed, or on a network file system without locks
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle >= 0:
            os.close(handle)


@contextlib.contextmanager
def as_default(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's global tracking URI for a moment: SQLite registries resolve `models:/` sources by it."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")  # MLflow keeps its global setting here as well
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None unsets it


def _quiet() -> None:
    """MLflow and alembic print dozens of lines about migrations when a data base is created."""
    import logging

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # stack traces of what `user_errors` words
