"""Options as they were written before. They go on working for one version, with a line that says the new spelling."""

from __future__ import annotations

import sys
from collections.abc import Sequence

OLD: dict[str, dict[str, str]] = {
    "demo": {"--work": "--workdir"},
    "generate": {"--batch": "--batch-size"},
    "lineage": {"--as-json": "--json"},
    "plan": {"--sampler-steps": "--steps"},
    "preprocess": {"--plan": "--dry-run", "--num-threads": "--threads"},
}
"""Verb → old option → new."""


def modern(verb: str, words: Sequence[str], *, quiet: bool = False) -> list[str]:
    """The words of a verb in today's spelling. quiet: whether --quiet stands elsewhere; nothing is said then."""
    old, quiet = OLD.get(verb, {}), quiet or "--quiet" in words
    made: list[str] = []
    for place, word in enumerate(words):
        name, sign, value = word.partition("=")
        following = words[place + 1] if place + 1 < len(words) else "-"
        if verb == "bench" and name == "--json" and (sign or not following.startswith("-")):  # a switch has no value
            made.append(_said(name, "--out", quiet) + sign + value)
        else:
            made.append(_said(name, old[name], quiet) + sign + value if name in old else word)
    return made


def _said(name: str, new: str, quiet: bool) -> str:
    if not quiet:
        said = f"{name} is written {new} now; the old spelling ends with this version"
        print(f"latentzoom: note: {said}", file=sys.stderr)
    return new
