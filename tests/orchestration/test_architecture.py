"""docs/architecture.md names what there is and nothing else, its worked examples apply, and long modules say why."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = ("pipeline", "preprocess", "training", "orchestration")
OF_ONE_KIND = ("pipeline/weights", "orchestration/serve/page")
"""Folders that the tree names without what they hold."""
EXAMPLES = re.findall(r"^### ([^\n]+)\n.*?^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LONGEST = 350


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # somebody else's checkout
        pytest.skip(listed.stderr)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def named() -> dict[str, str]:
    """Path → words of every line of the page's trees. A folder's path ends with a slash."""
    found: dict[str, str] = {}
    tree = PAGE[PAGE.index("<!-- tree -->") : PAGE.index("<!-- end of the tree -->")]
    for block in re.findall(r"^```\n(.*?)^```", tree, re.MULTILINE | re.DOTALL):
        above: list[str] = []
        for line in block.splitlines():
            indent, name, words = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
            above[len(indent) // 2 :] = [name]
            found["".join(above)] = words
    return found


def test_the_tree_names_every_module_and_folder_and_nothing_else():
    modules = {name for name in tracked() if name.split("/")[0] in PACKAGES and not name.startswith(OF_ONE_KIND)}
    folders = {f"{parent.as_posix()}/" for name in modules for parent in Path(name).parents if parent.name}
    folders |= {f"{name}/" for name in OF_ONE_KIND}
    wanted = {name for name in modules if not name.endswith("__init__.py")} | folders
    tree = named()
    listed = {name for name in tree if name.split("/")[0] in PACKAGES}
    assert sorted(wanted - listed) == [], "run: python .ci/tree"
    assert sorted(listed - wanted) == [], "run: python .ci/tree"
    for name in set(tree) - listed:
        assert (ROOT / name).exists(), name
    assert [name for name, words in tree.items() if not words] == []


@pytest.mark.parametrize("folder", ["infra", "docs", "tests"])
def test_the_tree_names_the_other_folders(folder):
    inside = {f"{Path(name).parent.as_posix()}/" for name in tracked() if name.startswith(f"{folder}/")}
    apart = {name for name in inside if not name.startswith(("tests/data/", "infra/chart/templates"))}
    assert sorted(apart - set(named())) == []


def test_there_is_an_example_for_everything_that_is_often_added():
    asked = ["source", "measure", "stage", "verb", "head"]
    assert [word for word, (title, _) in zip(asked, EXAMPLES) if word in title] == asked and len(EXAMPLES) == 5


@pytest.mark.parametrize("title, diff", EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_applies_to_this_tree_and_is_code(title, diff, tmp_path):
    for name in re.findall(r"^--- a/(.+)$", diff, re.MULTILINE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    apply = ["git", "apply", "--verbose", "-"]
    run = subprocess.run(apply, cwd=tmp_path, input=diff, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    changed = re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)
    assert changed and all((tmp_path / name).is_file() for name in changed)
    for name in changed:
        if name.endswith(".py"):
            ast.parse((tmp_path / name).read_text())


def test_a_long_module_says_why_it_is_one():
    long = []
    for name in sorted(tracked()):
        if name.endswith(".py") and name.split("/")[0] in PACKAGES:
            text = (ROOT / name).read_text()
            if text.count("\n") > LONGEST and "More than 350 lines" not in (ast.get_docstring(ast.parse(text)) or ""):
                long.append(name)
    assert long == [], "split them, or say why in the docstring: More than 350 lines: ..."


def test_every_package_says_what_lives_there():
    folders = {Path(name).parent for name in tracked() if name.endswith(".py") and name.split("/")[0] in PACKAGES}
    silent = [f.as_posix() for f in sorted(folders) if not (ROOT / f / "__init__.py").read_text().startswith('"""')]
    assert silent == []
