"""Early figures of quality while a stage trains. What measures them is the product's own evaluation, which lives above
this package: it is given to `training.run.train`, and here only dealt to the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from pipeline.bundle import Bundle
from training.world import World

if TYPE_CHECKING:
    from training.context import Context

PREFIX = "quality/"
Arrays = dict[str, np.ndarray]


class Quality(Protocol):
    """An evaluation of a model in memory. Sample i is the same, with the same noise, whoever computes it.

    num: samples; chunk: how many are computed together. names: figures that there may be."""

    num: int
    chunk: int
    names: tuple[str, ...]

    def measure(self, bundle: Bundle, start: int, stop: int) -> Arrays:
        """Arrays of samples start..stop-1, whose first axis counts samples."""

    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Figures by name of the arrays of all samples."""


MakeQuality = Callable[["Context"], Quality | None]
"""The evaluation that fits a run; None where its stage makes nothing that could be evaluated so."""


def measure_quality(quality: Quality, bundle: Bundle, world: World) -> dict[str, float]:
    """Figures under names "quality/...", the same on every worker. Each computes its share of the chunks and all of the
    figures, so that nobody waits for another. Collective."""
    starts = range(0, quality.num, quality.chunk)
    mine = {
        start: quality.measure(bundle, start, min(start + quality.chunk, quality.num))
        for start in starts[world.rank :: world.size]
    }
    parts: dict[int, Arrays] = {start: arrays for share in world.gather(mine) for start, arrays in share.items()}
    keys = dict.fromkeys(key for start in starts for key in parts[start])
    whole: dict[str, Any] = {key: np.concatenate([parts[start][key] for start in starts]) for key in keys}
    figures = quality.figures(whole)
    names = sorted(figures)
    # Processors may differ in the last bit; what is decided by these figures must not.
    agreed = world.mean(torch.tensor([figures[name] for name in names], dtype=torch.float64)).tolist()
    return {PREFIX + name: value for name, value in zip(names, agreed)}
