"""The alias `champion`: moved by one process at a time, with a way back whatever was killed in between.

MLflow moves an alias whatever it pointed to before, so looking and moving are two steps. Whoever does both holds a lock
meanwhile: a registered model of a certain name, which every store makes only once.

The version that was champion before is noted on the new one as pending *before* the alias moves, and for good after it:
of a process killed in between, the alias says which of the two it was.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping

from orchestration import tracking

CHAMPION = "champion"
PREVIOUS = "latentzoom.previous_champion"
_PENDING = "latentzoom.previous_champion_if_moved"
_OWNER = "latentzoom.owner"
LEFT_S = 60.0
"""A lock that stands so long was left by a process that is gone: moving an alias takes a second."""


@contextlib.contextmanager
def moving(uri: str, name: str) -> Iterator[None]:
    """Hold the lock of `name`'s champion. Waits for another holder, and takes over what a killed one left."""
    from mlflow.exceptions import MlflowException

    client, lock = tracking.client(uri), _lock(name)
    owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    seen, since = "", 0.0
    while True:
        try:
            client.create_registered_model(lock, tags={_OWNER: owner}, description=f"Moves the champion of {name}.")
            break
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        with contextlib.suppress(MlflowException):  # it was given back just now
            holder = str(client.get_registered_model(lock).tags.get(_OWNER, ""))
            if holder == owner:  # it was made, and the answer that said so was lost
                break
            if holder != seen:
                seen, since = holder, time.monotonic()
            elif time.monotonic() - since > LEFT_S:
                client.delete_registered_model(lock)
        time.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(MlflowException):
            client.delete_registered_model(lock)


def finish(uri: str, name: str) -> None:
    """Do what a process that was killed after it moved the champion did not come to: its note, and its lock."""
    from mlflow.exceptions import MlflowException

    client = tracking.client(uri)
    champion = client.get_model_version_by_alias(name, CHAMPION)
    try:
        client.get_registered_model(_lock(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        if _PENDING not in champion.tags:
            return
    with moving(uri, name):
        champion = client.get_model_version_by_alias(name, CHAMPION)
        settle(uri, name, str(champion.version), champion.tags)


def _lock(name: str) -> str:
    return f"{name}_champion_lock"


def move(uri: str, name: str, old: str, new: str) -> None:
    """Make version `new` champion in place of `old` ("": there was none). The caller holds the lock."""
    client = tracking.client(uri)
    client.set_model_version_tag(name, new, _PENDING, old)
    client.set_registered_model_alias(name, CHAMPION, new)
    settle(uri, name, new, {_PENDING: old})


def move_back(uri: str, name: str, to: str) -> None:
    """Make `to` champion again; what was before it stays as it was. The caller holds the lock."""
    client = tracking.client(uri)
    if _PENDING in client.get_model_version(name, to).tags:  # of a killed promotion, which never happened
        client.delete_model_version_tag(name, to, _PENDING)
    client.set_registered_model_alias(name, CHAMPION, to)


def settle(uri: str, name: str, champion: str, tags: Mapping[str, str]) -> None:
    """Note for good what was champion before the present one, where a killed process did not come so far."""
    if _PENDING in tags:
        client = tracking.client(uri)
        client.set_model_version_tag(name, champion, PREVIOUS, tags[_PENDING])
        client.delete_model_version_tag(name, champion, _PENDING)


def previous(tags: Mapping[str, str], *, is_champion: bool) -> str | None:
    """The version that was champion before the one with these tags; "": none was. None: it never was champion."""
    return tags[_PENDING] if is_champion and _PENDING in tags else tags.get(PREVIOUS)
