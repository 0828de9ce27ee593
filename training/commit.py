"""Which commit of this project's source is running: of its checkout, or what came with it where there is none."""

from __future__ import annotations

import os
import subprocess
from functools import lru_cache
from pathlib import Path

VARIABLE = "LATENTZOOM_COMMIT"
"""Set by `latentzoom submit`, which leaves `.git` at home, and by the image's build argument COMMIT."""


@lru_cache(maxsize=1)
def source_commit() -> str:
    """Commit of the source that this process runs; empty where nothing tells.

    A checkout is asked; a package that was installed is not, the repository around it would be another.
    """
    return commit_of(Path(__file__).resolve().parent.parent) or os.environ.get(VARIABLE, "").strip()


def commit_of(folder: Path) -> str:
    """HEAD of a checkout, with "+dirty" after it where tracked files differ; empty for a folder that is none."""
    if not (folder / ".git").exists():
        return ""
    commit = _git(folder, "rev-parse", "HEAD")
    return f"{commit}+dirty" if commit and _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
