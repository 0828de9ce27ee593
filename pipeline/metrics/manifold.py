"""Improved precision/recall (Kynkäänniemi et al. 2019), density/coverage (Naeem et al. 2020), in bounded memory.

Legend: N real and M fake samples, D features. Distances are Euclidean; a block of rows is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

_BLOCK = 512


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
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    real_radius, fake_radius = kth_neighbour(real, k, block), kth_neighbour(fake, k, block)
    fake_hits = np.zeros(len(fake), dtype=np.int64)
    real_inside = np.zeros(len(real), dtype=bool)
    covered = np.zeros(len(real), dtype=bool)
    for start in range(0, len(real), block):
        rows = slice(start, start + block)
        distance = distances(real[rows], fake)
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
    for start in range(0, len(features), block):
        rows = features[start : start + block]
        radius[start : start + block] = np.partition(distances(rows, features), k, axis=1)[:, k]
    return radius


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances (N,M)."""
    squared = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None] - 2 * (x @ y.T)
    if x is y:
        np.fill_diagonal(squared, 0.0)
    return np.sqrt(squared.clip(min=0))
