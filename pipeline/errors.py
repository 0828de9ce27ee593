"""What ends a command early, and its exit status then. `UserError`: a user can mend this; one line and 2. `Stopped`: it
was asked to stop, and the same command continues; one line and 75."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import sys
import traceback
from collections.abc import Callable

from pipeline.extras import missing

STOPPED = 75
"""Exit status of `Stopped` (EX_TEMPFAIL)."""


class UserError(ValueError):
    """Something a user caused. The message is one line: what, where, what to do."""


class Missing(UserError, FileNotFoundError):
    """There is no such file."""


class Unreachable(UserError, OSError):
    """A store (an object store, a web server) that does not answer or refuses. What went wrong is its `__cause__`.
    passes: where that was lost on the way from another process, whether a second attempt may succeed."""

    passes = False

    def __reduce__(self) -> tuple[Callable[[str, bool], Unreachable], tuple[str, bool]]:
        from pipeline.retry import is_passing

        return _arrived_unreachable, (str(self), is_passing(self))


def _arrived_unreachable(text: str, passes: bool) -> Unreachable:
    error = Unreachable(text)
    error.passes = passes
    return error


class Stopped(BaseException):
    """The run was asked to stop and has written a checkpoint. The message is one line. Like KeyboardInterrupt this is
    no failure, so it passes by whatever handles those."""


UNREAD = 128 + 13
"""Exit status of a command that was cut short as its standard output was closed: of SIGPIPE, as of other programs."""


class NobodyReads(BaseException):
    """Who was to read standard output is gone. No failure either: what takes a broken pipe for a lost connection, and
    tries again, does not see it. Other pipes and sockets that break are a BrokenPipeError."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `UserError` naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise UserError(f"{name} = {value!r} is not allowed; use {allowed}")


MANY = 1 << 31
"""Of a count that nothing else bounds: more is a slip of the hand."""
SEEDS = (-(1 << 62), 1 << 62)
"""Least and largest seed: one may be added to the number of a sample, and PyTorch takes 64 bits."""


def require_range(options: object, least: float, most: float, *names: str, is_open: bool = False) -> None:
    """Raise `UserError` naming the option, its value and what is allowed unless the field of each name, or each of its
    values where it holds several, is a number from `least` to `most`. None, which was not given, is allowed. is_open:
    `least` itself is not."""
    for name in names:
        value = getattr(options, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is None or (least <= one <= most and math.isfinite(one) and not (is_open and one == least)):
                continue
            shown = f"{one:.6g}" if isinstance(one, float) else one
            allowed = f"more than {least}, to {most}" if is_open else f"{least} to {most}"
            if most == MANY and one < least:
                allowed = f"{least} or more"
            raise UserError(f"--{name.replace('_', '-')} {shown} is not allowed; use {allowed}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its kind where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


NETWORK_MODULES = frozenset(
    {
        "botocore",
        "aiobotocore",
        "boto3",
        "aiohttp",
        "urllib3",
        "requests",
        "httpx",
        "httpcore",
        "s3fs",
        "gcsfs",
        "adlfs",
    }
    | {"azure", "google", "huggingface_hub", "fsspec", "ssl", "socket"}
)
"""Packages whose exceptions mean that a store did not answer or refused."""
_LOCAL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A full disk here, whatever was being talked to."""


def is_network_error(error: BaseException) -> bool:
    """Whether `error` is what talking to a store raises: its client's own kind, or the system's for networks."""
    if isinstance(error, (UserError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)):
        return isinstance(error, Unreachable)
    if isinstance(error, OSError):
        return error.errno not in _LOCAL
    modules = [type(error).__module__]
    if isinstance(error, ValueError):  # plain word of a client for its settings, such as an endpoint that is no URL
        modules.append(_raised_in(error))
    packages = {module.split(".")[0] for module in modules}
    packages |= {name.rstrip("0123456789") for name in packages}  # httpx2 is httpx
    return not NETWORK_MODULES.isdisjoint(packages)


def _raised_in(error: BaseException) -> str:
    """The module whose code raised it; "" where nobody did yet."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def unreachable(where: str, error: BaseException) -> Unreachable:
    """`error` as one line: which store, what it said, what to do. Nothing that signs a URL is shown."""
    name, text = type(error).__name__, first_line(error)
    if re.search(r"Credential|Token|Auth|Permission|Forbidden|AccessDenied|\b40[13]\b", f"{name} {text}"):
        todo = "check the credentials and what they permit"
    else:
        todo = "check the address and the network"
    shown = without_secrets(where)
    return Unreachable(f"cannot reach {shown}: {name}: {without_secrets(text)}; {todo}")


def without_secrets(text: str) -> str:
    """`text` whose URLs have no user names, passwords or queries, which may hold signatures."""
    return re.sub(r"(://)[^/@\s'\"]+@", r"\1", re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text))


def exit_status(command: Callable[[], int]) -> int:
    """Run a command → its exit status. A `UserError` is one line and 2, `Stopped` one line and 75, Ctrl-C 130 (a
    `KeyboardInterrupt` with a text says what comes next). One line is also what the client of a store raises where
    nobody else worded it: a network is no defect of ours; and a package of an extra that is not installed."""
    try:
        return _told(command)
    except UserError as error:
        print(f"latentzoom: error: {error}", file=sys.stderr)
        return 2
    except Stopped as notice:
        print(f"latentzoom: {notice}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        if (said := missing(error)) is None:
            raise
        print(f"latentzoom: error: {said}", file=sys.stderr)
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and not is_network_error(error):
            print(f"latentzoom: error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        if isinstance(error, OSError) and error.errno in _LOCAL:
            print(f"latentzoom: error: cannot write: {error.strerror}", file=sys.stderr)
            return 2
        if not is_network_error(error):
            raise
        print(f"latentzoom: error: {unreachable(_place_of(error), error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        what_next = str(error) or "run the same command again to continue"
        print(f"\nlatentzoom: interrupted; {what_next}", file=sys.stderr)
        return 130


def arrived(command: Callable[[], int]) -> int:
    """Run a command → its exit status, once what it printed has arrived; within `cleaned_output`. Where the reader of
    standard output has gone, nothing is said: the command's own status if it was through, else what a shell reports of
    a program that the lost pipe ended. Where it cannot be written otherwise, a line instead of what Python says as it
    ends."""
    status = UNREAD
    try:
        try:
            status = command()
            return _flushed(status)
        except SystemExit as end:  # of --help and --show-config
            status = end.code if isinstance(end.code, int) else 0
            end.code = _flushed(status)
            raise
    except NobodyReads:
        _give_up_output()
        return status


def _flushed(status: int) -> int:
    try:
        sys.stdout.flush()
    except NobodyReads:
        _give_up_output()
    except OSError as error:
        _give_up_output()
        print(f"latentzoom: error: cannot write to standard output: {error.strerror}", file=sys.stderr)
        return status or 2
    return status


def _give_up_output() -> None:
    """What is still to be written to standard output goes nowhere: Python tries once more as it ends, and complains."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _told(command: Callable[[], int]) -> int:
    """Run a command; with --verbose the traceback of what ends it is shown before its line."""
    try:
        return command()
    except Exception:
        from pipeline.common_options import now

        if now().verbose:
            traceback.print_exc()
        raise


def _place_of(error: BaseException) -> str:
    """The file that a system error names, else the kind of store."""
    named = getattr(error, "filename", None)
    return str(named) if named else f"a store (by {type(error).__module__.split('.')[0]})"
