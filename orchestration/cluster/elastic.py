"""Worker groups that a run may have: elastic runs use the numbers of workers that share the global batch evenly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError
from training.config import StageConfig
from training.engine import accumulation_steps


def worker_counts(config: StageConfig, least: int, most: int) -> tuple[int, ...]:
    """The numbers from `least` to `most` whose shares of the global batch are whole micro-batches, ascending.
    `UserError` when there is none."""
    refusals = []
    counts = []
    for num in range(least, most + 1):
        try:
            accumulation_steps(config, num)
            counts.append(num)
        except UserError as error:
            refusals.append(error)
    if not counts:
        raise refusals[-1]
    return tuple(counts)


def idle_workers(stage: str, config: StageConfig, least: int, most: int) -> str:
    """Says that a stage cannot use all workers, whose machines stand idle; empty where it can. `UserError` where it can
    use none of the numbers."""
    used = worker_counts(config, least, most)[-1]
    if used == most:
        return ""
    return (
        f"{stage} uses {used} of {most} workers: its global batch of {config.global_batch} is not shared evenly by "
        f"{most}; set {stage}.global_batch to a multiple of {most}"
    )


@contextlib.contextmanager
def scaling_among(counts: tuple[int, ...]) -> Iterator[None]:
    """Ray Train's elastic runs begun within choose among these numbers of workers: with room for others they take the
    next smaller one. Ray itself knows ranges only."""
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
    from ray.train.v2.api import data_parallel_trainer as trainer

    class Policy(ElasticScalingPolicy):
        def _count_possible_workers(self, reserved_resources: Any) -> int:
            possible = super()._count_possible_workers(reserved_resources)
            return max((num for num in counts if num <= possible), default=0)

    original = trainer.create_scaling_policy
    trainer.create_scaling_policy = lambda scaling_config: (
        Policy(scaling_config) if scaling_config.elasticity_enabled else original(scaling_config)
    )
    try:
        yield
    finally:
        trainer.create_scaling_policy = original
