"""`latentzoom preprocess KIND SOURCE DEST [...]`, `... check SOURCE`, `... verify DEST`, `... reencode SET DEST`."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from pipeline import command_line
from pipeline.common_options import answer, did_you_mean, out, taken
from pipeline.errors import Stopped, UserError, exit_status
from preprocess.config import CheckConfig, PreprocessConfig, VerifyConfig
from preprocess.reencode import ReencodeConfig
from preprocess.sources import SOURCES

if TYPE_CHECKING:
    from preprocess.tally import Observer

_PROG = "latentzoom preprocess"


def main(argv: list[str], observe: Observer | None = None, bundle_of: Callable[[str], str] = str) -> int:
    """Run the command; returns its exit code. observe: see `preprocess.run.preprocess`. bundle_of: the place of the
    bundle that --autoencoder names."""

    def command() -> int:
        with _sigterm_stops(), taken("preprocess", argv) as words:
            return _dispatch(words, observe, bundle_of)

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
        print(_help(), file=out())
        return 0 if argv else 2
    if argv[0] == "verify":
        return _verify(argv[1:])
    if argv[0] == "reencode":
        return _preprocess(parse_reencode(argv[1:]).as_run(), observe, bundle_of)
    if argv[0] == "check":
        return _check(argv[1:])
    if argv[0] not in SOURCES:
        near = did_you_mean(argv[0], KINDS)
        raise UserError(f"unknown source {argv[0]!r}{near}; use one of {', '.join(SOURCES)}, or {', '.join(OTHER)}")
    return _preprocess(parse(argv), observe, bundle_of)


OTHER: dict[str, type] = {"check": CheckConfig, "reencode": ReencodeConfig, "verify": VerifyConfig}
KINDS: dict[str, type] = {**dict.fromkeys(SOURCES, PreprocessConfig), **OTHER}
"""First word of the command line → its options."""


def parse(argv: list[str]) -> PreprocessConfig:
    """The configuration that a command line asks for."""
    kind, *rest = argv
    made = command_line.parse(PreprocessConfig, rest, prog=f"{_PROG} {kind}", description=SOURCES[kind][1])
    return made.replace(source=kind)


def parse_check(argv: list[str]) -> CheckConfig:
    """The configuration of `check [KIND] SOURCE ...`."""
    kind, rest = (argv[0], argv[1:]) if argv and argv[0] in SOURCES else ("folder", argv)
    text = "Decode every image once and list all that are bad."
    config = command_line.parse(CheckConfig, rest, prog=f"{_PROG} check {kind}", description=text)
    return dataclasses.replace(config, source=kind)


def parse_reencode(argv: list[str]) -> ReencodeConfig:
    """The configuration of `reencode SET DEST ...`."""
    text = "Make a set with the pixels, ids and splits of another and the latents of another encoder."
    return command_line.parse(ReencodeConfig, argv, prog=f"{_PROG} reencode", description=text)


def _check(argv: list[str]) -> int:
    """Exit code 0: every image can be used; 1: those listed cannot."""
    from preprocess.check import check

    config = parse_check(argv)
    report = check(config)
    answer(report.to_text(), report)
    return 1 if report.bad else 0


def _preprocess(config: PreprocessConfig, observe: Observer | None, bundle_of: Callable[[str], str]) -> int:
    from preprocess.run import planned, preprocess

    if config.autoencoder:
        config = config.replace(autoencoder=bundle_of(config.autoencoder))
    if config.plan:
        plans = [planned(one) for one in config.each_size()]
        answer("\n\n".join(plan.text for plan in plans), _each(config, [plan.facts for plan in plans]))
        return 0
    summaries = [preprocess(one, observe=observe) for one in config.each_size()]
    answer("\n\n".join(summary.to_text() for summary in summaries), _each(config, summaries))
    return 0


def _each(config: PreprocessConfig, found: list[Any]) -> Any:
    """For several sizes a list, else the only one."""
    return found if config.sizes else found[0]


def _verify(argv: list[str]) -> int:
    """Exit code 0: everything is whole; 1: the files named are damaged."""
    from preprocess.shards.verify import verify

    config = command_line.parse(VerifyConfig, argv, prog=f"{_PROG} verify")
    report = verify(config.dest, config.threads)
    lines = [f"damaged: {line}" for line in report.damage]
    if report.damage:
        num = len(report.damaged_files)
        lines.append(f"{num} files damaged; run the same preprocess command again to rebuild them")
    else:
        lines.append(f"{report.num_shards} shards, {report.num_samples} samples: all whole")
    answer("\n".join(lines), report)
    return 1 if report.damage else 0


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
