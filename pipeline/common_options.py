"""Options that every command has, and its two ways out: `answer`, the result that was asked for, and all else that it
says. Only the answer of a command with `--json` reaches standard output; with `--quiet` only the answer, warnings and
errors are said at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from pipeline.errors import UserError
from pipeline.old_spellings import modern


@dataclass(frozen=True, kw_only=True)
class Common:
    """What was asked for. log_file, config: paths, "" for none."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    log_file: str = ""
    config: str = ""
    show_config: bool = False

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise UserError("--quiet and --verbose contradict; leave one out")


COMMON: dict[str, tuple[str, str]] = {
    "--json": ("", "the answer as JSON, alone on standard output; all else goes to standard error"),
    "--quiet": ("", "no progress and no notes: the answer, warnings and errors only"),
    "--verbose": ("", "more of what is logged, and where an error came from"),
    "--log-file": ("FILE", "append all that is said, with times, to this file"),
    "--config": ("FILE", "settings from a YAML or TOML file (option: value); the command line's own count before them"),
    "--show-config": ("", "print all settings as they would hold, as YAML for --config, and do nothing"),
}
"""Option → (what its value is, "" for a flag; what it does)."""

_now: Common | None = None
"""None between commands."""
_out: TextIO | None = None


def now() -> Common:
    """The common options of the command that runs."""
    return _now or Common()


def split(words: Sequence[str]) -> tuple[Common, list[str]]:
    """The common options among the words of a command, and its other words. Raises `UserError`."""
    found: dict[str, Any] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word == "--":
            rest += [word, *left]
            break
        name, sign, value = word.partition("=")
        if name not in COMMON:
            rest.append(word)
            continue
        field = name[2:].replace("-", "_")
        if not COMMON[name][0]:
            if sign:
                raise UserError(f"{name} takes no value; leave out {sign}{value}")
            found[field] = True
            continue
        value = value if sign else next(left, "")
        if not value:
            raise UserError(f"{name} needs the name of a file")
        found[field] = value
    return Common(**found), rest


@contextlib.contextmanager
def in_force(common: Common) -> Iterator[None]:
    """Within the block these options hold: what is printed and no `answer` goes where they send it."""
    global _now, _out
    before = _now, _out
    with contextlib.ExitStack() as stack:
        _now, _out = common, sys.stdout
        if common.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        elif common.quiet:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(_own_log())
        try:
            yield
        finally:
            _now, _out = before


@contextlib.contextmanager
def taken(verb: str, words: Sequence[str]) -> Iterator[list[str]]:
    """For a verb that may also be started without `latentzoom`: its words without the common options, which are in
    force within the block. Those that hold already stay."""
    common, rest = split(modern(verb, words))
    with contextlib.nullcontext() if common == Common() and _now is not None else in_force(common):
        yield rest


def answer(text: str, data: Any) -> None:
    """Say a command's result: `text` to people, with --json `data` (JSON types, dataclasses, paths) to programs. A
    number that is none is null there."""
    print(json.dumps(plain(data), indent=1) if now().json else text, file=out(), flush=True)


def out() -> TextIO:
    """Where the answer goes, for what is no line of text, and for help and settings that were asked for."""
    return _out or sys.stdout


def note(text: str) -> None:
    """Say on standard error what is good to know; nothing with --quiet."""
    if not now().quiet:
        print(text, file=sys.stderr, flush=True)


def plain(value: Any) -> Any:
    """`value` in JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def console_log(level: int = logging.INFO) -> None:
    """What is logged from `level` on goes to standard error as plain lines; with --quiet warnings only. Until the block
    of `in_force` ends."""
    global _console
    level = logging.WARNING if now().quiet else level
    root = logging.getLogger()
    if _console is None:
        from pipeline.progress import log_format

        stream = getattr(sys.stderr, "console", sys.stderr)
        _console = logging.StreamHandler(stream)
        _console.setFormatter(logging.Formatter(log_format(stream)))
        root.addHandler(_console)
        _console.setLevel(level)
    _console.setLevel(min(level, _console.level))
    root.setLevel(min(level, root.level))


_console: logging.Handler | None = None


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """After the block nobody listens who did not before."""
    global _console
    root, before = logging.getLogger(), _console
    level, _console = root.level, None
    if now().verbose:
        console_log()
    try:
        yield
    finally:
        if _console is not None:
            root.removeHandler(_console)
        root.setLevel(level)
        _console = before


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean --scale?" for the known name that is nearest, "" where none is near."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
