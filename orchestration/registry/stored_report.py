"""The evaluation report that a version was registered with."""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

from orchestration.registry.logged_model import REPORT_PATH
from orchestration.registry.version import TAG, Version
from orchestration.tracking import local_store
from orchestration.tracking import store as tracking
from pipeline import storage
from pipeline.errors import UserError


def stored_report(version: Version, *, tracking_uri: str) -> dict[str, Any] | None:
    """The evaluation report given at registration; None when none was. `UserError` when it is lost."""
    if not version.tags.get(TAG + "report"):
        return None
    reason = "its run and its model are no longer in the store"
    for place in _report_places(version, tracking_uri):
        local = local_store.local_path(place)
        try:
            if local is None or local.is_file():
                return _downloaded_report(place, tracking_uri) if local is None else storage.read_json(str(local))
            reason = f"there is nothing at {local}"
        except UserError as error:
            reason = str(error)
    raise UserError(f"the evaluation report of {version.uri} is lost: {reason}; evaluate anew, with promote --data")


def _report_places(version: Version, uri: str) -> list[str]:
    """With the model, and with the run, where versions of before have it."""
    client = tracking.client(uri)
    places = []
    for lookup, path in (
        (lambda: client.get_logged_model(version.model_id).artifact_location, REPORT_PATH),
        (lambda: client.get_run(version.run_id).info.artifact_uri, version.tags[TAG + "report"]),
    ):
        with contextlib.suppress(UserError), tracking.user_errors(uri):
            places.append(f"{local_store.artifact_place(uri, str(lookup())).rstrip('/')}/{path}")
    return places


def _downloaded_report(place: str, uri: str) -> dict[str, Any]:
    import mlflow.artifacts

    with tracking.user_errors(uri), tempfile.TemporaryDirectory() as folder:
        local = mlflow.artifacts.download_artifacts(artifact_uri=place, dst_path=folder, tracking_uri=uri)
        report: dict[str, Any] = storage.read_json(local)
    return report
