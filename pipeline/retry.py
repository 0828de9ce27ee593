"""Trying again when a store fails for a passing reason: 429 and 5xx answers, time-outs, dropped connections."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.errors import NETWORK_MODULES, Unreachable, UserError

T = TypeVar("T")
MAX_WAIT = 30.0
"""Longest pause between two attempts, in seconds."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a full disk and a used-up quota."""
_LASTING = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EFBIG, errno.ELOOP, errno.EINVAL}
_LASTING_TYPES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


class RetryCounter:
    """Counts repeated attempts over all threads of a process."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[RetryCounter], tuple[()]]:
        return RetryCounter, ()  # every process counts its own

    def add(self) -> None:
        with self._lock:
            self.count += 1


def is_passing(error: BaseException) -> bool:
    """Whether a second attempt may succeed."""
    if isinstance(error, Unreachable):
        return error.passes if error.__cause__ is None else is_passing(error.__cause__)
    if isinstance(error, (*_LASTING_TYPES, UserError)):
        return False
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    return isinstance(error, TimeoutError) or type(error).__module__.split(".")[0] in NETWORK_MODULES


def with_retries(
    action: Callable[[], T], what: str, attempts: int, counter: RetryCounter, first_wait: float = 0.2
) -> T:
    """Run `action` up to `attempts` times with growing, jittered pauses. Lasting errors are raised at once."""
    import tenacity  # before it is needed: where it is missing, nothing begins

    failed: list[Exception] = []
    try:
        return action()  # nearly always enough, and cheaper than what follows
    except Exception as error:
        failed.append(error)

    def attempt() -> T:
        if failed:
            raise failed.pop()
        return action()

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=first_wait, max=MAX_WAIT),
        retry=tenacity.retry_if_exception(is_passing),
        before_sleep=lambda state: counter.add(),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except Exception as error:
        if is_passing(error):
            raise UserError(f"{what} failed {attempts} times, the last time with: {error}") from error
        raise


@dataclass(frozen=True)
class Retries:
    """How often something is tried at most whose store fails for a passing reason, and what counts the repetitions."""

    attempts: int = 1
    counter: RetryCounter = field(default_factory=RetryCounter)

    def __call__(self, action: Callable[[], T], what: str) -> T:
        """The result of `action`. what: its name in the line that says that all attempts failed (`UserError`); a single
        attempt raises what it raises."""
        return action() if self.attempts == 1 else with_retries(action, what, self.attempts, self.counter)


ONCE = Retries()
