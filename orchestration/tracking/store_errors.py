"""A tracking store that cannot be reached, or refuses, as one clear line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from orchestration.tracking.local_store import (
    SQLITE,
)
from pipeline.errors import UserError, first_line, is_network_error, unreachable
from pipeline.redact import clean, url_without_secrets


class StoreError(UserError):
    """The tracking store cannot be reached, or refuses."""


class StoreSilent(StoreError):
    """It does not answer, and may soon."""


@contextlib.contextmanager
def user_errors(uri: str) -> Iterator[None]:
    """Turn a store that cannot be reached, or refuses, into one clear line."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    shown = url_without_secrets(uri)
    try:
        yield
    except requests.exceptions.RequestException as error:
        raise StoreSilent(
            f"cannot reach the tracking server {shown}: {type(error).__name__}; is it running?"
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        kind = StoreSilent if _may_answer(uri, error) else StoreError
        raise kind(f"cannot use the tracking data base {shown}: {clean(first_line(error))}") from error
    except MlflowException as error:
        kind = StoreSilent if _is_silence(error) else StoreError
        raise kind(f"tracking store {shown}: {clean(first_line(error))}") from error
    except ImportError as error:
        raise StoreError(f"tracking store {shown}: {clean(first_line(error))}; install what is missing") from error
    except Exception as error:  # its artifacts may lie in an object store
        if isinstance(error, UserError) or not is_network_error(error):
            raise
        raise StoreSilent(str(unreachable(f"the artifacts of {shown}", error))) from error


_PASSING = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")


def _is_silence(error: Any) -> bool:
    """Whether what MLflow says is that nobody answered it, or not now."""
    return error.error_code in _PASSING or "failed with exception" in str(error) or "too many 50" in str(error)


def _may_answer(uri: str, error: Exception) -> bool:
    """Whether a data base may answer soon: a server that is down; of a file only one that somebody else writes to."""
    import sqlalchemy.exc

    is_down = isinstance(error, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError))
    return is_down and (not uri.startswith(SQLITE) or "locked" in str(error))
