"""Configurations that an earlier version wrote, read in today's terms.

What is stored (in a bundle, a checkpoint, a run folder) carries `config_version`; what carries none is of version 1. A
change of what a stored field means, or of what its absence means, raises CONFIG_VERSION and adds a `Migration`: a small
named function from the terms of the version before to the new ones. Fields that merely came later need none: they have
the default that does what was done before.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError

CONFIG_VERSION = 2
_log = logging.getLogger("latentzoom")


@dataclass(frozen=True)
class Migration:
    """version: the first whose terms it gives. apply: plain JSON of a configuration → the same in those terms; it may
    change its argument."""

    version: int
    name: str
    apply: Callable[[dict[str, Any]], dict[str, Any]]


MODEL_MIGRATIONS: tuple[Migration, ...] = ()
"""Of the model's configuration, by version."""


def migrated(
    stored: dict[str, Any], version: int, migrations: Iterable[Migration], where: str, *, log: bool = True
) -> dict[str, Any]:
    """A configuration of a version in today's terms. log: name each migration that changed something, and what.
    `UserError` for one of a later version, whose terms nobody here knows."""
    if version > CONFIG_VERSION:
        raise UserError(
            f"{where} was written by a later latentzoom (configuration version {version}, this one reads up to "
            f"{CONFIG_VERSION}); update this installation"
        )
    for migration in migrations:
        if version < migration.version:
            before, stored = stored, migration.apply(copy.deepcopy(stored))
            changes = [f"{name} {old!r} → {new!r}" for name, old, new in differences(before, stored)]
            if changes and log:
                _log.info("%s has configuration version %d; %s: %s", where, version, migration.name, ", ".join(changes))
    return stored


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted names of what differs, with both values; None where there is none."""
    found: list[tuple[str, Any, Any]] = []
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((prefix + name, old, new))
    return found
