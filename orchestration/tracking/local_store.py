"""A tracking store in a local SQLite file: whether it is there, and where its artifacts are after it was moved.

MLflow writes absolute places into the data base. A store's folder that is moved or copied as a whole keeps its
artifacts beside the data base, so that is where they are looked for first.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

from pipeline.errors import UserError

SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"
"""The folder beside the data base that holds the artifacts of every experiment we make."""
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's schema that hold places of artifacts."""


def database(uri: str) -> Path | None:
    """The SQLite file of a tracking URI; None for servers and other data bases."""
    return Path(uri[len(SQLITE) :]) if uri.startswith(SQLITE) else None


def require_file(uri: str) -> None:
    """`UserError` where the SQLite file of `uri` is missing."""
    file = database(uri)
    if file is not None and not file.exists():
        raise UserError(f"there is no store at {file}; set --tracking-uri or MLFLOW_TRACKING_URI to the one you mean")


def require_store(uri: str) -> None:
    """`UserError` unless the SQLite file of `uri` is an MLflow store: MLflow itself would make one, or fill a strange
    data base with its tables, when somebody only wants to read."""
    require_file(uri)
    file = database(uri)
    if file is not None and not _tables(file):
        raise UserError(f"{file} is empty, no MLflow store; set --tracking-uri or MLFLOW_TRACKING_URI")


def check_makeable(uri: str) -> None:
    """`UserError` where no store can be made at the SQLite file of `uri`; its folder is made."""
    file = database(uri)
    if file is None:
        return
    if file.exists():
        _tables(file)  # refuses what is something else
        require_writable(uri)
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {file.parent}: {error.strerror}; choose another --tracking-uri") from error
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"cannot write to {file.parent}: permission denied; choose another --tracking-uri")


def require_writable(uri: str) -> None:
    """`UserError` where the SQLite file of `uri` can only be read; said before the work, not after it."""
    file = database(uri)
    if file is None or not file.exists():
        return
    for place in (file, file.parent):  # SQLite writes a journal beside the file
        if not os.access(place, os.W_OK):
            raise UserError(
                f"cannot write to the store {file}: no permission for {place}; choose another --tracking-uri"
            )


def artifact_place(uri: str, location: str) -> str:
    """Where the artifacts are that the store `uri` recorded at `location`: beside a local data base if they are there,
    else as recorded. The end of a location, ID/artifacts, is unique."""
    file, recorded = database(uri), local_path(location)
    if file is None or recorded is None:
        return location
    parts = recorded.parts[1:]
    for start in range(len(parts) - 1):
        beside = file.parent.joinpath(*parts[start:])
        if beside.exists():
            return str(beside)
    return str(recorded)


def local_path(location: str) -> Path | None:
    """A recorded place as a path; None where it lies in an object store or behind a server."""
    if location.startswith("file:"):
        return Path(unquote(urlparse(location).path))
    return Path(location) if location.startswith("/") else None


def follow_move(uri: str) -> str | None:
    """Before something is written: let the records of a store that was moved or copied point to the artifacts beside
    it, else MLflow would make the old folders anew. Returns the old place of the artifacts, None if nothing was moved.

    A record whose artifacts are at the old place only stays as it is."""
    file = database(uri)
    if file is None or not file.exists():
        return None
    moved = None
    with contextlib.closing(_open(file, "ro")) as connection, _explained(file):
        roots = [row[0] for row in connection.execute("SELECT artifact_location FROM experiments") if row[0]]
    for location in roots:
        old = local_path(location)
        if old is None or old.parent.name != ARTIFACTS or old.parent.parent == file.parent:
            continue
        new = file.parent / ARTIFACTS / old.name
        if new.exists() or not old.exists():
            with contextlib.closing(_open(file, "rw")) as connection, _explained(file), connection:
                for table, column in _LOCATIONS:
                    _rewrite(connection, table, column, old, new)
            moved = str(old.parent)
    return moved


def _rewrite(connection: sqlite3.Connection, table: str, column: str, old: Path, new: Path) -> None:
    for key, location in connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
        path = local_path(location or "")
        if path is None or not path.is_relative_to(old):
            continue
        target = new / path.relative_to(old)
        if target.exists() or (path == old and not path.exists()):
            text = f"file://{quote(str(target))}" if location.startswith("file:") else str(target)
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (text, key))


def _tables(file: Path) -> set[str]:
    """Names of the tables in a data base, none in an empty one. `UserError` where it is not MLflow's."""
    with contextlib.closing(_open(file, "ro")) as connection, _explained(file):
        names = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if names and "experiments" not in names:
        raise UserError(f"{file} is a data base of something else, no MLflow store; choose another --tracking-uri")
    return names


def _open(file: Path, mode: str) -> sqlite3.Connection:
    with _explained(file):
        return sqlite3.connect(f"file:{quote(str(file))}?mode={mode}", uri=True, timeout=20)


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(f"cannot use the tracking data base {file}: {error}; choose another --tracking-uri") from error
