"""MLflow tracking: where runs are kept, one parent run per experiment, one child per stage, data sets and provenance.

Everything goes through `MlflowClient` with an explicit URI, so nothing depends on MLflow's global state and a Ray
worker needs only two strings: the tracking URI and the run id.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.local_store import (
    ARTIFACTS,
    SQLITE,
    check_makeable,
    database,
    follow_move,
    require_file,
    require_store,
)
from pipeline.errors import UserError, first_line, is_network_error, unreachable
from pipeline.redact import clean, plain_without_secrets, url_without_secrets
from training.commit import source_commit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "latentzoom"
_SERVED = ("http", "https", "sqlite", "databricks", "databricks-uc", "uc")
_USUAL = "sqlite:///path/mlflow.db or http://host:port"
_PARAM_LIMIT = 6000
_UI = {"mlflow.experimentKind": "custom_model_development"}
"""Shows the experiment in MLflow's view for trained models, not the one for language-model applications."""
STEPS = "latentzoom.steps"
_COMPARED = ("steps", "global_batch", "lr", "precision")
_LOCKS = ("requirements.lock", "requirements.txt", "uv.lock")


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


class StoreError(UserError):
    """The tracking store cannot be reached, or refuses."""


class StoreSilent(StoreError):
    """It does not answer, and may soon."""


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
            print(f"note: {file} was moved or copied; its records no longer point to {old}", file=sys.stderr)
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


def experiment_id(uri: str, name: str = EXPERIMENT) -> str:
    """The id of experiment `name`, created if missing. With SQLite, artifacts lie beside the data base."""
    from mlflow.exceptions import MlflowException

    tracking = make_store(uri)
    with user_errors(uri):
        found = tracking.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        file = database(uri)
        location = str(file.parent / ARTIFACTS / name) if file is not None else None
        try:
            return str(tracking.create_experiment(name, artifact_location=location, tags=_UI))
        except MlflowException:
            found = tracking.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)


def start_run(
    uri: str,
    name: str,
    *,
    parent: str | None = None,
    experiment: str = EXPERIMENT,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> str:
    """Create a run and return its id. `parent` (a run id) makes it a child: it shows nested under the parent.

    The run is RUNNING until `end_run`; workers attach to it by id.
    """
    experiment_key = experiment_id(uri, experiment)
    all_tags = {**provenance(), **dict(tags or {}), "mlflow.user": os.environ.get("USER", "latentzoom")}
    if parent is not None:
        all_tags["mlflow.parentRunId"] = parent
    with user_errors(uri):
        run = client(uri).create_run(experiment_key, run_name=name, tags=all_tags)
        run_id = str(run.info.run_id)
        log_params(uri, run_id, params or {})
    return run_id


def find_run(
    uri: str,
    name: str,
    *,
    parent: str | None = None,
    tag: tuple[str, str] | None = None,
    experiment: str = EXPERIMENT,
) -> str | None:
    """The newest run called `name` (a child of `parent`, or with the tag (key, value), when given), so that a
    continued job finds its run again."""
    wanted = {"mlflow.parentRunId": parent} if parent is not None else {}
    if tag is not None:
        wanted[tag[0]] = tag[1]
    conditions = [equals("attributes.run_name", name), *(equals(f"tags.`{k}`", v) for k, v in wanted.items())]
    with user_errors(uri):
        experiment_key = experiment_id(uri, experiment)  # makes the store where there is none yet
        for run in client(uri).search_runs([experiment_key], " and ".join(conditions), max_results=100):
            if run.info.run_name == name and wanted.items() <= run.data.tags.items():
                return str(run.info.run_id)
    return None


def equals(key: str, value: str) -> str:
    """A condition of MLflow's filters. They have no way to write an apostrophe in a text: there, any character will do,
    and whoever asks looks himself."""
    return f"{key} = '{value}'" if "'" not in value else "{} LIKE '{}'".format(key, value.replace("'", "_"))


def reopen_run(uri: str, run_id: str) -> None:
    """A run that was killed, or failed, goes on."""
    with user_errors(uri):
        if client(uri).get_run(run_id).info.status != "RUNNING":
            client(uri).update_run(run_id, status="RUNNING")


def end_run(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """Close a run: FINISHED, FAILED or KILLED."""
    with user_errors(uri):
        client(uri).set_terminated(run_id, status=status)


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> None:
    """Flat parameters of a run. Nested mappings become dotted names; a value already logged is left as it is."""
    from mlflow.entities import Param

    known = client(uri).get_run(run_id).data.params
    flat = {k: clean(v) for k, v in flatten(params).items() if k not in known}
    items = [Param(key, value[:_PARAM_LIMIT]) for key, value in flat.items()]
    for start in range(0, len(items), 100):
        client(uri).log_batch(run_id, params=items[start : start + 100])


def log_settings(uri: str, run_id: str, values: Mapping[str, Any]) -> None:
    """All settings of a stage as the artifact settings.json, the few that people compare runs by as parameters. MLflow
    writes every parameter above each picture, and a hundred would push the picture out of sight. A parameter stays what
    it was at first: the number of steps, which may be raised, is a tag (`STEPS`) too."""
    flat = flatten(values)
    client(uri).log_dict(run_id, flat, "settings.json")
    if "steps" in flat:
        client(uri).set_tag(run_id, STEPS, str(flat["steps"]))
    log_params(uri, run_id, {name: flat[name] for name in _COMPARED if name in flat})


def log_metrics(
    uri: str,
    run_id: str,
    metrics: Mapping[str, float],
    *,
    step: int = 0,
    timestamp_ms: int | None = None,
    model_id: str | None = None,
    dataset: tuple[str, str] | None = None,
) -> None:
    """Log metrics of one step, optionally linked to a logged model and to a data set (name, digest)."""
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    stamp = timestamp_ms or get_current_time_millis()
    name, digest = dataset or (None, None)
    items = [
        Metric(
            key, float(value), stamp, step, model_id=model_id, run_id=run_id, dataset_name=name, dataset_digest=digest
        )
        for key, value in metrics.items()
    ]
    for start in range(0, len(items), 500):
        client(uri).log_batch(run_id, metrics=items[start : start + 500])


def log_dataset(uri: str, run_id: str, url: str, digest: str, *, name: str = "", context: str = "training") -> None:
    """Link a run to the data set at `url`. MLflow shows the first 36 characters of a digest; the tag keeps all 64. The
    entity is made here: `mlflow.data` would need a class for this kind of source, to make the same of it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name or clean(url).rstrip("/").rsplit("/", 1)[-1],
        digest=short_digest(digest),
        source_type="latentzoom_shards",
        source=json.dumps({"url": clean(url), "manifest_sha256": digest}),
    )
    with user_errors(uri):
        client(uri).log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
        client(uri).set_tag(run_id, f"data.{context}", digest)


def short_digest(digest: str) -> str:
    """MLflow's digest column holds 36 characters."""
    return digest[:36]


def get_run(uri: str, run_id: str) -> Run:
    with user_errors(uri):
        return client(uri).get_run(run_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} → {"a.b": "1"}."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


@functools.lru_cache(maxsize=1)
def provenance() -> dict[str, str]:
    """Tags that say which code made a run: git commit (and whether the tree was dirty), lock hash, versions."""
    root = Path(__file__).resolve().parent.parent
    commit = source_commit()
    lock = next((root / name for name in _LOCKS if (root / name).is_file()), None)
    return {
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
        **({"mlflow.source.git.commit": commit.removesuffix("+dirty")} if commit else {}),
        "git_commit": commit or f"none (installed package {_version('latentzoom')})",
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock else installed_digest(),
        "versions": json.dumps(versions()),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    names = ("latentzoom", "torch", "diffusers", "numpy", "scipy", "pillow", "safetensors", "mlflow", "ray")
    return {"python": ".".join(map(str, sys.version_info[:3])), **{name: _version(name) for name in names}}


def installed_digest() -> str:
    """SHA-256 over all installed distributions: the lock hash of an environment made without a lock file."""
    names = sorted({f"{d.metadata['Name']}=={d.version}".lower() for d in metadata.distributions()})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@contextlib.contextmanager
def user_errors(uri: str) -> Iterator[None]:
    """Turn a store that cannot be reached, or refuses, into one clear line."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    shown = url_without_secrets(uri)
    try:
        yield
    except requests.exceptions.RequestException as error:
        raise StoreSilent(
            f"cannot reach the tracking server {shown}: {type(error).__name__}; is it running?"
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        kind = StoreSilent if _may_answer(uri, error) else StoreError
        raise kind(f"cannot use the tracking data base {shown}: {clean(first_line(error))}") from error
    except MlflowException as error:
        kind = StoreSilent if _is_silence(error) else StoreError
        raise kind(f"tracking store {shown}: {clean(first_line(error))}") from error
    except ImportError as error:
        raise StoreError(f"tracking store {shown}: {clean(first_line(error))}; install what is missing") from error
    except Exception as error:  # its artifacts may lie in an object store
        if isinstance(error, UserError) or not is_network_error(error):
            raise
        raise StoreSilent(str(unreachable(f"the artifacts of {shown}", error))) from error


_PASSING = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")


def _is_silence(error: Any) -> bool:
    """Whether what MLflow says is that nobody answered it, or not now."""
    return error.error_code in _PASSING or "failed with exception" in str(error) or "too many 50" in str(error)


def _may_answer(uri: str, error: Exception) -> bool:
    """Whether a data base may answer soon: a server that is down; of a file only one that somebody else writes to."""
    import sqlalchemy.exc

    is_down = isinstance(error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError))
    return is_down and (not uri.startswith(SQLITE) or "locked" in str(error))


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


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
