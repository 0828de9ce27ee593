"""Patience with the store of a data set, and a full disk in words that help."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.retry import FULL as FULL
from pipeline.retry import Retries
from pipeline.retry import RetryCounter as RetryCounter
from pipeline.retry import with_retries as with_retries
from pipeline.storage import is_local

PATIENT = Retries(6, RetryCounter())
"""Of the small reads and writes of a destination; the large ones have the run's own number."""


def explain_full_disk(error: BaseException, dest: str) -> BaseException:
    """A full disk as something the user can mend; any other error unchanged."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return error
    if is_local(dest):
        return UserError(f"no space left while writing to {dest}; free some and run again, finished shards are kept")
    return UserError(
        f"no space left in {tempfile.gettempdir()}, where shards grow before they go to {dest}; free some, or set "
        "TMPDIR to a roomier folder, and run again: finished shards are kept"
    )


@contextlib.contextmanager
def full_disk_explained(dest: str) -> Iterator[None]:
    """Around anything that writes to `dest`."""
    try:
        yield
    except OSError as error:
        explained = explain_full_disk(error, dest)
        if explained is error:
            raise
        raise explained from error
