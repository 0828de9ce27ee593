"""What ends a command early. `UserError`: a user can mend this; one line and exit status 2. `Stopped`: it was asked to
stop, and the same command continues; one line and exit status 75."""

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
