"""`latentzoom serve`: a page where one drops a picture and zooms without end, and the HTTP interface under it."""

from __future__ import annotations

import os

from orchestration.serve.arguments import Arguments as Arguments
from pipeline.command_line import parse, with_settings
from pipeline.progress import Notice

TOKEN_VARIABLE = "LATENTZOOM_SERVE_TOKEN"


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom serve")
    if arguments.address:
        from orchestration.serving import submit

        return submit(arguments, without_address(with_settings(Arguments, argv, "latentzoom serve")))
    with Notice("latentzoom: starting") as notice:
        from orchestration.serving import run, run_on_ray

        token = os.environ.get(TOKEN_VARIABLE, "")
        return (run_on_ray if arguments.on_ray else run)(arguments, token, notice)


def without_address(argv: list[str]) -> list[str]:
    """The arguments for the cluster."""
    words = []
    skip = False
    for word in argv:
        if skip or word == "--address" or word.startswith("--address="):
            skip = word == "--address"
            continue
        words.append(word)
    return words
