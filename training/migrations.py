"""Stages' settings that an earlier version wrote, in today's terms, and runs that go on as they began.

A run that began under an earlier version and is continued by the same command must not be refused because a default, or
the meaning of a field, changed meanwhile. What it was begun with is in its checkpoints: where the command asks for what
it asked then, the run keeps what it had (`as_begun`). What somebody changes on purpose is refused as ever.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.config import ModelConfig, from_dict, to_dict
from pipeline.migrations import MODEL_MIGRATIONS, Migration, differences, migrated
from training.checkpoint import newest_state
from training.config import StageConfig, older_first_stage

_log = logging.getLogger("latentzoom")


@dataclass(frozen=True)
class ChangedDefault:
    """From `version` on, the default of a field is `now`. name: "settings.weight_clip" or "model.decoder.norm"; stage:
    of a setting, "" for all."""

    version: int
    name: str
    before: Any
    now: Any
    stage: str = ""


CHANGED_DEFAULTS: tuple[ChangedDefault, ...] = ()
"""Defaults of dataclasses and of presets, by version. One may change again: a run of before the first change keeps what
it had."""


def stage_migrations(stage: str, model: ModelConfig) -> list[Migration]:
    """For {"settings": ..., "model": ...}, by version. model: today's."""

    def in_ldm_units(stored: dict[str, Any]) -> dict[str, Any]:
        return {**stored, "settings": older_first_stage(stored["settings"], model)}

    def of_model(apply: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda stored: {**stored, "model": apply(stored["model"])}

    first = [Migration(2, "the first stage's loss in LDM's units", in_ldm_units)] if stage == "autoencoder" else []
    of_models = [dataclasses.replace(migration, apply=of_model(migration.apply)) for migration in MODEL_MIGRATIONS]
    return sorted([*first, *of_models], key=lambda migration: migration.version)


def in_todays_terms(stage: str, model: ModelConfig, stored: dict[str, Any], where: str) -> dict[str, Any]:
    """What a checkpoint stored of a run ("settings", "model" and more); "config_version" is left out."""
    version = int(stored.get("config_version", 1))
    rest = {name: value for name, value in stored.items() if name != "config_version"}
    known = {"settings": rest.get("settings", {}), "model": rest.get("model", {})}
    return {**rest, **migrated(known, version, stage_migrations(stage, model), where)}


Kept = dict[str, dict[str, Any]]
"""Dotted name → {"asked": what the command says, "used": what the run began with}."""


def as_begun(
    stage: str, config: StageConfig, model: ModelConfig, run_dir: str, *, log: bool
) -> tuple[StageConfig, ModelConfig, Kept]:
    """Settings and model that the command asks for, as a run in `run_dir` that began under an earlier version has them,
    and what was kept. A folder without checkpoints changes nothing. log: say what is kept (the main worker)."""
    state = newest_state(storage.join(run_dir, "checkpoints"))
    run = state.get("fingerprint", {}) if state else {}
    if state is None or run.get("stage") != stage:
        return config, model, {}
    asked = {"settings": to_dict(config), "model": to_dict(model)}
    defaults = {"settings": to_dict(type(config)()), "model": to_dict(type(model)())}
    version = int(run.get("config_version", 1))
    stored = {"settings": run["settings"], "model": run["model"]}
    today = migrated(stored, version, stage_migrations(stage, model), run_dir, log=False)
    begun = state.get("as_begun", {})
    kept: Kept = {name: {"asked": values["asked"], "used": _at(today, name)} for name, values in begun.items()}
    for name, old, used in differences(stored, today):
        is_same = _at(asked, name) == (_at(defaults, name) if old is None else old)
        if is_same and _at(asked, name) != used:
            kept[name] = {"asked": _at(asked, name), "used": used}
    for change in sorted(CHANGED_DEFAULTS, key=lambda change: change.version):
        if version < change.version and change.stage in ("", stage):
            before = kept.get(change.name, {"asked": _at(stored, change.name), "used": _at(today, change.name)})
            if before["asked"] == change.before:
                kept[change.name] = {**before, "asked": change.now}
    kept = {name: values for name, values in kept.items() if _at(asked, name) == values["asked"] != values["used"]}
    for name, values in kept.items():
        _put(asked, name, values["used"])
        if log:
            used, now = values["used"], values["asked"]
            _log.info("%s goes on with %s = %r, as it began; new runs have %r", run_dir, name, used, now)
    if not kept:
        return config, model, kept
    return (
        from_dict(type(config), asked["settings"], f"{run_dir}: settings"),
        from_dict(type(model), asked["model"], f"{run_dir}: model"),
        kept,
    )


def _at(tree: dict[str, Any], name: str) -> Any:
    """The value at a dotted name, or None."""
    value: Any = tree
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        tree = tree[part]
    tree[last] = value
