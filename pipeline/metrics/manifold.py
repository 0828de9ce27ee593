"""Improved precision/recall (Kynkäänniemi et al. 2019), density/coverage (Naeem et al. 2020), in bounded memory.

Legend: N real and M fake samples, D features. Distances are Euclidean; a block of rows is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

_BLOCK = 1024


@dataclass(frozen=True)
class Manifold:
    """precision: fakes inside some real ball. recall: reals inside some fake ball. density: mean number of real balls
    around a fake, over k. coverage: reals whose ball holds a fake."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: np.ndarray, fake: np.ndarray, k: int = 3, block: int = _BLOCK) -> Manifold:
    """Features (N,D) and (M,D) → the four figures, with balls up to the k-th nearest neighbour."""
    return Manifold(**{name: float(each.mean()) for name, each in manifold_samples(real, fake, k, block).items()})


def manifold_samples(real: np.ndarray, fake: np.ndarray, k: int = 3, block: int = _BLOCK) -> dict[str, np.ndarray]:
    """What each sample adds: a figure of `Manifold` is the mean of its array, of fakes (M,) for precision and density,
    of reals (N,) for recall and coverage. Resampling an array gives an interval with the balls as they are."""
    if min(len(real), len(fake)) <= k:
        raise UserError(
            f"precision/recall with k = {k} needs at least {k + 1} samples a side, got {len(real)} and {len(fake)}"
        )
    real_radius, fake_radius = kth_neighbour(real, k, block), kth_neighbour(fake, k, block)
    fake_hits = np.zeros(len(fake), dtype=np.int64)
    real_inside = np.zeros(len(real), dtype=bool)
    covered = np.zeros(len(real), dtype=bool)
    for rows, distance in _distances(real, fake, block):
        fake_hits += (distance < real_radius[rows, None]).sum(axis=0)
        real_inside[rows] = (distance < fake_radius[None]).any(axis=1)
        covered[rows] = distance.min(axis=1) < real_radius[rows]
    return {
        "precision": (fake_hits > 0).astype(np.float64),
        "recall": real_inside.astype(np.float64),
        "density": fake_hits / k,
        "coverage": covered.astype(np.float64),
    }


def kth_neighbour(features: np.ndarray, k: int, block: int = _BLOCK) -> np.ndarray:
    """Distance of each sample to its k-th nearest other sample: (N,D) → (N,)."""
    radius = np.empty(len(features))
    for rows, distance in _distances(features, features, block):
        distance[np.arange(len(distance)), np.arange(rows.start, rows.stop)] = 0.0
        distance.partition(k, axis=1)
        radius[rows] = distance[:, k]
    return radius


def _distances(x: np.ndarray, y: np.ndarray, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Euclidean distances of some rows of x to all of y, (block, M) in float64, again and again in the same memory.

    Features are widened a block at a time: 50 000 x 4096 of them are 0.8 GB in float32, and nothing else is that big.
    """
    y_squared = np.concatenate([_squared(y[start : start + block]) for start in range(0, len(y), block)])
    memory = np.empty((min(block, len(x)), len(y)))
    for start in range(0, len(x), block):
        some = x[start : start + block].astype(np.float64)
        distance = memory[: len(some)]
        for first in range(0, len(y), block):
            np.matmul(some, y[first : first + block].astype(np.float64).T, out=distance[:, first : first + block])
        distance *= -2
        distance += _squared(some)[:, None]
        distance += y_squared
        np.sqrt(np.maximum(distance, 0.0, out=distance), out=distance)
        yield slice(start, start + len(some)), distance


def _squared(features: np.ndarray) -> np.ndarray:
    """Squared length of each sample (N,)."""
    return np.einsum("nd,nd->n", features, features, dtype=np.float64)
