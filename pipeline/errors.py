"""The one exception that means: a user can mend this. Command lines print it as a single line and exit with 2."""


class UserError(ValueError):
    """Something a user caused. The message is one line: what, where, what to do."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `UserError` naming the setting, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise UserError(f"{name} = {value!r} is not allowed; use {allowed}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters; its kind where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
