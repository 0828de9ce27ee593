"""When a pool of workers gives up."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from preprocess.lost_workers import MAX_ATTEMPTS, LostWorkers

KILLED = RuntimeError("killed\nand more lines")


def test_the_same_work_may_not_cost_too_many_workers() -> None:
    losses = LostWorkers()
    for attempt in range(MAX_ATTEMPTS - 1):
        losses.worker_died(["shard 1", f"shard {attempt + 2}"], KILLED, had_started=True)
    losses.worker_died(["shard 9"], KILLED, had_started=True)
    with pytest.raises(UserError, match=r"^shard 1 lost 4 workers; are they short of memory\? The last: .*killed$"):
        losses.worker_died(["shard 1"], KILLED, had_started=True)


def test_workers_that_never_start_end_the_run_and_one_that_starts_wipes_the_slate() -> None:
    losses = LostWorkers()
    for _ in range(MAX_ATTEMPTS - 1):
        losses.worker_died([], KILLED, had_started=False)
    losses.worker_started()
    for _ in range(MAX_ATTEMPTS - 1):
        losses.worker_died([], KILLED, had_started=False)
    losses.worker_died([], KILLED, had_started=True)  # not a failed start
    with pytest.raises(UserError, match="workers do not start: .*killed"):
        losses.worker_died([], KILLED, had_started=False)
