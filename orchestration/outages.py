"""Outages pass: work that a store or a server held up is taken up again once it answers, for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from orchestration.tracking import StoreSilent
from pipeline.errors import NETWORK_MODULES, Unreachable, UserError, first_line
from pipeline.redact import clean
from preprocess.retry import is_passing

if TYPE_CHECKING:
    import tenacity

T = TypeVar("T")
ATTEMPTS = 35
"""How often something is asked before it counts as gone: with these pauses for a quarter of an hour."""
PAUSE_S, MAX_PAUSE_S = 2.0, 30.0


class Silent(UserError):
    """A server that does not answer, and may soon."""


def is_outage(error: BaseException) -> bool:
    """Whether a store, a tracking server or a cluster's head did not answer. One that refuses says so every time."""
    if isinstance(error, Unreachable):
        return is_passing(error) and "check the credentials" not in str(error)
    if isinstance(error, UserError):
        return isinstance(error, (Silent, StoreSilent))
    known = (
        isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in NETWORK_MODULES
    )
    return known and is_passing(error)


def patiently(action: Callable[[], T], what: str) -> T:
    """`action()`, again and again while it ends in an outage: for a quarter of an hour, with growing pauses. It must
    continue where it was. what: its name in the lines that say so. Every other error is raised at once; an outage that
    does not end becomes a `UserError`."""

    import tenacity

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        said = clean(first_line(error)) if error else ""
        print(f"{what}: {said}; trying again in {state.upcoming_sleep:.0f} s", file=sys.stderr, flush=True)

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=PAUSE_S, max=MAX_PAUSE_S),
        retry=tenacity.retry_if_exception(is_outage),
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(action)
    except Exception as error:
        if is_outage(error):
            raise UserError(f"{clean(first_line(error))} (asked {ATTEMPTS} times)") from error
        raise
