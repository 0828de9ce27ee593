"""The one exception that means: a user can mend this. Command lines print it as a single line and exit with 2."""


class UserError(ValueError):
    """Something a user caused. The message is one line: what, where, what to do."""
