"""Where a command's words end up besides the terminal: the file of `--log-file`, and the report of a crash."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from pipeline.common_options import Common, in_force, split
from pipeline.errors import UserError, arrived, exit_status, first_line
from pipeline.old_spellings import modern
from pipeline.redact import clean, cleaned_output, remember_in

CRASHED = 70
"""Exit status of a defect of ours (EX_SOFTWARE)."""


def alone(verb: str, main: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Run a verb that was started without `latentzoom`, with what happens to its words and errors there."""

    def command() -> int:
        common, words = split(modern(verb, argv, quiet="--quiet" in argv))
        return recorded(lambda: main(words), [verb, *words], common)

    with cleaned_output(list(argv)):
        return arrived(lambda: exit_status(command))


def recorded(command: Callable[[], int], words: Sequence[str], common: Common) -> int:
    """Run a command with its common options in force → its exit status; what is a defect of ours is `crash`."""
    if common.config:
        with contextlib.suppress(OSError):  # which is said where it is read
            remember_in(Path(common.config).read_text(errors="replace"))
    with logged(common.log_file, words), in_force(common):
        try:
            return exit_status(command)
        except BrokenPipeError:
            raise
        except Exception as error:
            return crash(error, words, common.log_file)


class Teed:
    """A stream whose lines also go to a log, with the time, and without secrets. A progress bar, which a terminal
    overwrites, does not. console: the stream itself."""

    def __init__(self, console: TextIO, log: TextIO) -> None:
        self.console, self._log, self._open = console, log, ""

    def write(self, text: str) -> int:
        num = self.console.write(text)
        if "\r" not in text:
            *lines, self._open = (self._open + text).split("\n")
            for line in lines:
                self._log.write(f"{_clock()} {clean(line)}\n" if line else "")
        return num

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)


@contextlib.contextmanager
def logged(file: str, words: Sequence[str]) -> Iterator[None]:
    """Within the block all that is printed, said and logged is also appended to `file`; "" for no file."""
    if not file:
        yield
        return
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        log = open(file, "a", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--log-file {file}: {error.strerror}") from error
    root = logging.getLogger()
    handlers: list[logging.Handler] = [logging.StreamHandler(log), logging.StreamHandler(sys.stderr)]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers[0].setLevel(logging.INFO)
    handlers[1].setLevel(logging.WARNING)  # as where nobody listens
    with log, contextlib.ExitStack() as stack:
        log.write(f"{_clock()} {clean(shlex.join(['latentzoom', *words]))}\n")
        level = root.level
        stack.callback(root.setLevel, level)
        for handler in handlers[: 1 if root.handlers else 2]:
            root.addHandler(handler)
            stack.callback(root.removeHandler, handler)
        root.setLevel(min(level, logging.INFO))
        if sys.stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(Teed(sys.stdout, log)))
        stack.enter_context(contextlib.redirect_stderr(Teed(sys.stderr, log)))
        yield


def _clock() -> str:
    return datetime.datetime.now().isoformat(sep=" ", timespec="milliseconds")


def crash(error: Exception, words: Sequence[str], log_file: str = "") -> int:
    """A defect of ours, as one line that names the log with the whole of it, and its exit status."""
    trace = "".join(traceback.format_exception(error))
    report = clean(f"{shlex.join(['latentzoom', *words])}\n{_versions()}\n{trace}")
    where = _written(report, log_file)
    text = f"this is a defect of latentzoom, not of yours: {type(error).__name__}: {first_line(error)}"
    todo = f"please report it with {where}" if where else f"please report it:\n{report}"
    print(f"latentzoom: error: {clean(text)}; {todo}", file=sys.stderr)
    return CRASHED


def _versions() -> str:
    import platform
    from importlib import metadata

    found = []
    for name in ("latentzoom", "torch", "ray", "deepspeed", "mlflow", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return f"{', '.join(found)}; Python {platform.python_version()}; {platform.platform()}"


def _written(report: str, log_file: str) -> str:
    """The file that holds the report; "" where none can be written."""
    import tempfile

    from pipeline.storage import cache_folder  # not before it is needed: it takes its time

    name = f"crash-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    places = [Path(log_file)] if log_file else [cache_folder() / "logs" / name, Path(tempfile.gettempdir()) / name]
    for place in places:
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(report)
            return str(place)
    return ""
