"""docs/how-training-works.md names files and what is in them: all of it is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/how-training-works.md").read_text()
NAMED = re.findall(r"`([a-z_]+/[\w/]+\.py)`\s+`([\w.]+)`", TEXT)


def test_the_page_names_much() -> None:
    assert len(NAMED) > 40 and {"training", "preprocess", "pipeline", "orchestration"} == {
        p.split("/")[0] for p, _ in NAMED
    }
    assert set(re.findall(r"`([a-z_]+/[\w/]+\.py)`", TEXT)) == {path for path, _ in NAMED}  # no file without a name


@pytest.mark.parametrize("path, name", sorted(set(NAMED)))
def test_what_is_named_is_there(path: str, name: str) -> None:
    body = ast.parse((ROOT / path).read_text()).body
    for part in name.split("."):
        found = [
            node for node in body
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == part
        ]  # fmt: skip
        assert found, f"{path} has no {name}"
        body = found[0].body
