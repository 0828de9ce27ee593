"""`latentzoom export`: a bundle as others read it. Judged here; `orchestration.exporting` does what is asked for."""

from __future__ import annotations

from orchestration.export_arguments import Arguments as Arguments
from pipeline.command_line import parse


def main(argv: list[str]) -> int:
    """Write the folder; returns 0."""
    arguments = parse(Arguments, argv, prog="latentzoom export")
    from orchestration.exporting import run

    return run(arguments)
