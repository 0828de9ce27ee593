"""What may be lost before a pool of workers gives up: the same piece of work, or workers that never start."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.errors import UserError, first_line

MAX_ATTEMPTS = 4


class LostWorkers:
    """Counts lost workers. Losing one now and then is normal; losing them all for one reason is not."""

    def __init__(self) -> None:
        self._attempts: dict[str, int] = {}
        self._failed_starts = 0  # since the last worker that started

    def worker_started(self) -> None:
        """Workers can start, so earlier ones that did not were bad luck."""
        self._failed_starts = 0

    def worker_died(self, work: Iterable[str], error: Exception, *, had_started: bool) -> None:
        """`work`: names of what it was doing. Raises `UserError` when it is time to give up."""
        for name in work:
            self._attempts[name] = self._attempts.get(name, 0) + 1
            if self._attempts[name] >= MAX_ATTEMPTS:
                raise UserError(
                    f"{name} lost {MAX_ATTEMPTS} workers; are they short of memory? The last: {first_line(error)}"
                ) from error
        self._failed_starts += not had_started
        if self._failed_starts >= MAX_ATTEMPTS:
            raise UserError(f"workers do not start: {first_line(error)}") from error
