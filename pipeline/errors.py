"""What ends a command early, and its exit status then. `UserError`: a user can mend this; one line and 2. `Stopped`: it
was asked to stop, and the same command continues; one line and 75."""

from __future__ import annotations

import sys
from collections.abc import Callable

STOPPED = 75
"""Exit status of `Stopped` (EX_TEMPFAIL)."""


class UserError(ValueError):
    """Something a user caused. The message is one line: what, where, what to do."""


class Stopped(BaseException):
    """The run was asked to stop and has written a checkpoint. The message is one line. Like KeyboardInterrupt this is
    no failure, so it passes by whatever handles those."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `UserError` naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise UserError(f"{name} = {value!r} is not allowed; use {allowed}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its kind where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def exit_status(command: Callable[[], int]) -> int:
    """Run a command → its exit status. A `UserError` is one line and 2, `Stopped` one line and 75, Ctrl-C 130."""
    try:
        return command()
    except UserError as error:
        print(f"latentzoom: error: {error}", file=sys.stderr)
        return 2
    except Stopped as notice:
        print(f"latentzoom: {notice}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("\nlatentzoom: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
