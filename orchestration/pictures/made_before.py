"""What exists already, by one rule for every command that writes: what this very command made is kept and counts as
done; what is another's is refused, unless --overwrite. Names decide nothing, but what a result depends on does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline import storage
from pipeline.canvas import read_text
from pipeline.errors import UserError

_PREFIX = "latentzoom:"
MODEL = f"{_PREFIX}model"
INPUT = f"{_PREFIX}input"


def decisive(text: Mapping[str, str]) -> dict[str, str]:
    """Of a file's texts, those that its pixels depend on. Of a model that is its digest, whatever its address was."""
    return {
        key: value.rpartition(" ")[2] if key == MODEL else value
        for key, value in text.items()
        if key.startswith(_PREFIX)
    }


def todo(wanted: Sequence[tuple[str, Callable[[], Mapping[str, str]]]], *, overwrite: bool) -> list[int]:
    """wanted: targets (paths or URLs) and what gives the texts that they will hold → indices of those still to be made.
    Raises `UserError` naming what is there and would be lost."""
    missing, others = [], []
    for index, (target, text) in enumerate(wanted):
        if not storage.exists(target):
            missing.append(index)
            continue
        found, due = decisive(read_text(target)), decisive(text())
        if found != due:
            missing.append(index)
            others.append((target, _difference(found, due)))
    if others and not overwrite:
        target, why = others[0]
        more = f", and so are {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{target} is there already, {why}{more}; --overwrite replaces such files, or write to another place"
        )
    return missing


def _difference(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    if not found:
        return "and no result of this command"
    for key in (*wanted, *found):
        if found.get(key) != wanted.get(key):
            name = key.removeprefix(_PREFIX)
            if name in ("model", "input"):
                return f"made {'by another model' if name == 'model' else 'of another picture'}"
            return f"made with {name} {found.get(key, 'not given')}, not {wanted.get(key, 'left out')}"
    return "made in another way"
