"""Which commit made a run: a checkout's own, or the one that came with a copy that has no `.git`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.commit import VARIABLE, commit_of

ROOT = Path(__file__).resolve().parents[2]
SAY = "from training.commit import source_commit; print(source_commit())"


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_checkout_tells_its_commit_and_whether_it_was_changed(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit_of(checkout) == head
    (checkout / "beside").write_text("not tracked")
    assert commit_of(checkout) == head
    (checkout / "file").write_text("two")
    assert commit_of(checkout) == f"{head}+dirty"


def test_a_package_within_another_repository_is_not_of_its_commit(checkout: Path) -> None:
    installed = checkout / ".venv/site-packages"
    (installed / "training").mkdir(parents=True)
    shutil.copy(ROOT / "training/commit.py", installed / "training")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop(VARIABLE, None)
    command = [sys.executable, "-c", SAY]
    for told in ("", "f00d+dirty"):
        more = {VARIABLE: told} if told else {}
        said = subprocess.run(
            command, cwd=installed, env=environment | more, capture_output=True, text=True, check=True
        )
        assert said.stdout == f"{told}\n"
