"""Command lines in a process of their own, where nothing is imported yet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PROGRAM = """
import contextlib, io, json, sys
from orchestration.cli import main
answers = []
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(line)
        except SystemExit as end:
            status = end.code
    heavy = sorted({"torch", "diffusers", "ray", "mlflow"} & sys.modules.keys())
    answers.append([status, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(answers))
"""


def answers(
    lines: list[list[str]],
    *,
    before: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[tuple[int | None, str, str, list[str]]]:
    """(exit status, what was printed, what was said, heavy modules imported by then) of each command line, one after
    the other. before: a program that runs first."""
    command = [sys.executable, "-c", before + PROGRAM, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return [tuple(answer) for answer in json.loads(done.stdout.splitlines()[-1])]
