"""One registered version: how it is named, and found by number or alias."""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestration.tracking import store as tracking
from pipeline.errors import UserError
from pipeline.redact import url_without_secrets

CANDIDATE = "candidate"
TAG = "latentzoom."
"""What the names of our tags begin with."""


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


def check_name(name: str) -> None:
    """`UserError` where a model cannot have this name, or could not be addressed by it."""
    if not name.strip() or name in (".", "..") or re.search(r"[/:@\x00-\x1f]", name):
        raise UserError(f"name = {name!r} is not allowed for a model; use letters, digits, '-', '_' and '.'")


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
        model_id=found.tags.get(TAG + "model_id", ""),
        run_id=str(found.run_id or ""),
        tags=dict(found.tags),
    )


def parse_model_uri(uri: str) -> tuple[str, str]:
    """`models:/NAME@alias` → (NAME, alias); `models:/NAME/3` → (NAME, "3")."""
    rest = uri.removeprefix("models:/")
    for separator in ("@", "/"):
        name, found, which = rest.rpartition(separator)
        if found and name and which and "/" not in name and (separator == "@" or which.isdigit()):
            return name, which
    raise UserError(f"{uri} is not a model URI; use models:/NAME@alias or models:/NAME/VERSION")


def require_version(name: str, which: str, uri: str) -> Version:
    """Version by number or alias; `UserError` when there is none."""
    version = get_version(name, which, tracking_uri=uri)
    if version is None:
        kind, shown = "version" if which.isdigit() else "alias", url_without_secrets(uri)
        raise UserError(f"no {kind} {which!r} of model {name!r} in {shown}; see `latentzoom register`")
    return version
