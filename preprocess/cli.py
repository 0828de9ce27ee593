"""`latentzoom preprocess SOURCE-KIND SOURCE DEST [...]` and `latentzoom preprocess verify DEST`."""

from __future__ import annotations

import contextlib
import io
import sys

import tyro

from pipeline.errors import UserError, exit_status
from preprocess.config import PreprocessConfig
from preprocess.sources import SOURCES
from preprocess.tally import Observer

_PROG = "latentzoom preprocess"


def main(argv: list[str], observe: Observer | None = None) -> int:
    """Run the command; returns its exit code. observe: see `preprocess.run.preprocess`."""
    return exit_status(lambda: _dispatch(argv, observe))


def _dispatch(argv: list[str], observe: Observer | None) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "verify":
        return _verify(argv[1:])
    if argv[0] not in SOURCES:
        raise UserError(f"unknown source {argv[0]!r}; use one of {', '.join(SOURCES)}, or verify")
    return _preprocess(parse(argv), observe)


def parse(argv: list[str]) -> PreprocessConfig:
    """The configuration that a command line asks for."""
    kind, *rest = argv
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config = tyro.cli(PreprocessConfig, prog=f"{_PROG} {kind}", args=rest, description=SOURCES[kind][1])
    except SystemExit as exit:
        if isinstance(exit.__context__, UserError):  # a value that parses but is not allowed: one line is enough
            raise exit.__context__ from None
        sys.stderr.write(printed.getvalue())
        raise
    return config.replace(source=kind)


def _preprocess(config: PreprocessConfig, observe: Observer | None) -> int:
    from preprocess.run import plan_text, preprocess

    if config.plan:
        print(plan_text(config))
        return 0
    summary = preprocess(config, observe=observe)
    print(summary.to_json() if config.json else summary.to_text())
    return 0


def _verify(argv: list[str]) -> int:
    """Exit code 0: everything is whole; 1: the files named are damaged."""
    from preprocess.verify import verify

    report = tyro.cli(verify, prog=f"{_PROG} verify", args=argv)
    for line in report.damage:
        print(f"damaged: {line}")
    if report.damage:
        print(f"{len(report.damaged_files)} files damaged; run the same preprocess command again to rebuild them")
        return 1
    print(f"{report.num_shards} shards, {report.num_samples} samples: all whole")
    return 0


def _help() -> str:
    lines = [f"usage: {_PROG} KIND SOURCE DEST [options]", f"       {_PROG} verify DEST", "", "kinds of source:"]
    lines += [f"  {name:12} {text}" for name, (_, text) in SOURCES.items()]
    lines += ["", f"{_PROG} KIND --help lists the options."]
    return "\n".join(lines)
