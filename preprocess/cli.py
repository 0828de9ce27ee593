"""`latentzoom preprocess KIND SOURCE DEST [...]`, `... check SOURCE`, `... verify DEST`, `... reencode SET DEST`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import tyro

from pipeline.errors import Stopped, UserError, exit_status
from preprocess.config import PreprocessConfig
from preprocess.sources import SOURCES

if TYPE_CHECKING:
    from preprocess.check import CheckConfig
    from preprocess.reencode import ReencodeConfig
    from preprocess.tally import Observer

_PROG = "latentzoom preprocess"


def main(argv: list[str], observe: Observer | None = None, bundle_of: Callable[[str], str] = str) -> int:
    """Run the command; returns its exit code. observe: see `preprocess.run.preprocess`. bundle_of: the place of the
    bundle that --autoencoder names."""

    def command() -> int:
        with _sigterm_stops():
            return _dispatch(argv, observe, bundle_of)

    return exit_status(command)


@contextlib.contextmanager
def _sigterm_stops() -> Iterator[None]:
    """SIGTERM ends the command like Ctrl-C, with the exit status of a run that the same command continues."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped; whatever was finished is kept: run the same command again to continue")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(argv: list[str], observe: Observer | None, bundle_of: Callable[[str], str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "verify":
        return _verify(argv[1:])
    if argv[0] == "reencode":
        return _preprocess(parse_reencode(argv[1:]).as_run(), observe, bundle_of)
    if argv[0] == "check":
        return _check(argv[1:])
    if argv[0] not in SOURCES:
        raise UserError(f"unknown source {argv[0]!r}; use one of {', '.join(SOURCES)}, or check, reencode, verify")
    return _preprocess(parse(argv), observe, bundle_of)


def parse(argv: list[str]) -> PreprocessConfig:
    """The configuration that a command line asks for."""
    kind, *rest = argv
    return _parsed(PreprocessConfig, f"{_PROG} {kind}", rest, SOURCES[kind][1]).replace(source=kind)


_Config = TypeVar("_Config")


def _parsed(kind: type[_Config], prog: str, argv: list[str], description: str) -> _Config:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, prog=prog, args=argv, description=description)
    except SystemExit as exit:
        if isinstance(exit.__context__, UserError):  # a value that parses but is not allowed: one line is enough
            raise exit.__context__ from None
        sys.stderr.write(printed.getvalue())
        raise


def parse_check(argv: list[str]) -> CheckConfig:
    """The configuration of `check [KIND] SOURCE ...`."""
    from preprocess.check import CheckConfig

    kind, rest = (argv[0], argv[1:]) if argv and argv[0] in SOURCES else ("folder", argv)
    config = _parsed(CheckConfig, f"{_PROG} check {kind}", rest, "Decode every image once and list all that are bad.")
    return dataclasses.replace(config, source=kind)


def parse_reencode(argv: list[str]) -> ReencodeConfig:
    """The configuration of `reencode SET DEST ...`."""
    from preprocess.reencode import ReencodeConfig

    text = "Make a set with the pixels, ids and splits of another and the latents of another encoder."
    return _parsed(ReencodeConfig, f"{_PROG} reencode", argv, text)


def _check(argv: list[str]) -> int:
    """Exit code 0: every image can be used; 1: those listed cannot."""
    from preprocess.check import check

    config = parse_check(argv)
    report = check(config)
    print(report.to_json() if config.json else report.to_text())
    return 1 if report.bad else 0


def _preprocess(config: PreprocessConfig, observe: Observer | None, bundle_of: Callable[[str], str]) -> int:
    from preprocess.run import plan_text, preprocess

    if config.autoencoder:
        config = config.replace(autoencoder=bundle_of(config.autoencoder))
    if config.plan:
        print("\n\n".join(plan_text(one) for one in config.each_size()))
        return 0
    summaries = [preprocess(one, observe=observe) for one in config.each_size()]
    if config.json:
        print(summaries[0].to_json() if not config.sizes else f"[{','.join(s.to_json() for s in summaries)}]")
    else:
        print("\n\n".join(summary.to_text() for summary in summaries))
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
    lines = [
        f"usage: {_PROG} KIND SOURCE DEST [options]",
        f"       {_PROG} check [KIND] SOURCE [options]    list all images that cannot be used",
        f"       {_PROG} reencode SET DEST --autoencoder NAME    the latents of a set by another encoder",
        f"       {_PROG} verify DEST                      look for damage in a finished set",
        "",
        "kinds of source:",
    ]
    lines += [f"  {name:12} {text}" for name, (_, text) in SOURCES.items()]
    lines += ["", f"{_PROG} KIND --help lists the options."]
    return "\n".join(lines)
