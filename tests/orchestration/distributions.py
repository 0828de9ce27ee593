"""What an installation of the project holds: the installed packages that its requirements, or an extra's, bring."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(extra: str = "") -> list[Requirement]:
    """The project's own requirements, or those of one of its extras without the extras that it includes."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def included(extra: str) -> set[str]:
    """An extra and all that it includes."""
    found, lines = {extra}, PROJECT["optional-dependencies"][extra] if extra else []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            found |= set().union(*(included(other) for other in requirement.extras))
    return found


def closure(requirements: Iterable[Requirement]) -> dict[str, metadata.Distribution]:
    """Every distribution that they bring, by its canonical name. What is not installed here is left out."""
    todo, found, seen = list(requirements), {}, set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        extras = ["", *requirement.extras]
        for needed in map(Requirement, found[name].requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return found


def tops(distribution: metadata.Distribution) -> Iterator[str]:
    """The first parts of its files' names: modules, packages and metadata, without scripts."""
    for file in distribution.files or []:
        if file.parts[0] not in ("..", "__pycache__", "bin", "share"):
            yield file.parts[0]


def importable() -> dict[str, set[str]]:
    """Import name → canonical names of the installed distributions that have it."""
    return {name: {canonicalize_name(d) for d in found} for name, found in metadata.packages_distributions().items()}


class Hidden:
    """A finder in place of all others, for which only the distributions that are kept are installed: `find_spec` of
    other packages gives None, an import of them fails, and they have no metadata."""

    def __init__(self, packages: Iterable[str], kept: Iterable[str]) -> None:
        self.packages, self.kept, self.finders = frozenset(packages), frozenset(kept), list(sys.meta_path)

    def find_distributions(self, *context: Any) -> Iterator[metadata.Distribution]:
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from (d for d in finder.find_distributions(*context) if canonicalize_name(d.name) in self.kept)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.packages:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

    def invalidate_caches(self) -> None:
        for finder in self.finders:
            if hasattr(finder, "invalidate_caches"):
                finder.invalidate_caches()


def hide_all_but(requirements: Iterable[Requirement]) -> None:
    """From now on this process has no third-party package but what the requirements bring."""
    kept = set(closure(requirements)) | {PROJECT["name"], "pip", "setuptools"}
    hidden = [name for name, distributions in importable().items() if not distributions & kept]
    sys.meta_path[:] = [Hidden(hidden, kept)]
