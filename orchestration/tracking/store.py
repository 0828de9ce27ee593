"""MLflow tracking: where runs are kept, one parent run per experiment, one child per stage, data sets and provenance.

Everything goes through `MlflowClient` with an explicit URI, so nothing depends on MLflow's global state and a Ray
worker needs only two strings: the tracking URI and the run id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestration.tracking.connection import EXPERIMENT as EXPERIMENT
from orchestration.tracking.connection import as_default as as_default
from orchestration.tracking.connection import client as client
from orchestration.tracking.connection import make_store as make_store
from orchestration.tracking.connection import tracking_uri as tracking_uri
from orchestration.tracking.local_store import (
    ARTIFACTS,
    database,
)
from orchestration.tracking.provenance import installed_digest as installed_digest
from orchestration.tracking.provenance import provenance as provenance
from orchestration.tracking.provenance import versions as versions
from orchestration.tracking.store_errors import StoreError as StoreError
from orchestration.tracking.store_errors import StoreSilent as StoreSilent
from orchestration.tracking.store_errors import user_errors as user_errors
from pipeline.redact import clean

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Run


_PARAM_LIMIT = 6000
_UI = {"mlflow.experimentKind": "custom_model_development"}
"""Shows the experiment in MLflow's view for trained models, not the one for language-model applications."""
STEPS = "latentzoom.steps"
_COMPARED = ("steps", "global_batch", "lr", "precision")


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
        _link(uri, run_id, DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        client(uri).set_tag(run_id, f"data.{context}", digest)


def _link(uri: str, run_id: str, data: DatasetInput) -> None:
    """MLflow looks for a data set, then makes it: of two that do so at once one is refused, and finds it next time."""
    for attempt in range(3):
        try:
            client(uri).log_inputs(run_id, datasets=[data])
            return
        except Exception as error:
            made_meanwhile = "UNIQUE constraint failed: datasets", "duplicate key value"
            if attempt == 2 or not any(words in str(error) for words in made_meanwhile):
                raise


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
