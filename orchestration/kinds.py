"""Which dataclasses say what a verb may be asked."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from orchestration.cli import VERBS


def kinds(verb: str) -> dict[str, type]:
    """By the first words of the verb's command line: "" where there is but one, else `folder`, `verify`, ..."""
    if verb == "train":
        from training.cli import Arguments

        return {"": Arguments}
    if verb == "preprocess":
        from preprocess.cli import KINDS

        return KINDS
    module = importlib.import_module(VERBS[verb][0])
    return dict(getattr(module, "KINDS", {"": getattr(module, "Arguments", None)}))


def kind_of(verb: str, words: Sequence[str]) -> tuple[type, int]:
    """The dataclass of a command line, and how many of its first words choose it."""
    found = kinds(verb)
    if words[:1] and words[0] in found:
        return found[words[0]], 1
    return found.get("") or next(iter(found.values())), 0
