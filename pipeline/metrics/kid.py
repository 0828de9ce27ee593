"""KID: unbiased squared MMD with a cubic polynomial kernel (Binkowski et al. 2018). Legend: N samples, D features."""

from __future__ import annotations

import numpy as np

from pipeline.errors import UserError
from pipeline.metrics.bootstrap import NUM_RESAMPLES, resample_counts

_GROUP = 2000
"""Samples whose kernel matrices are in memory at once."""


def polynomial_mmd(real: np.ndarray, fake: np.ndarray, degree: int = 3) -> float:
    """Unbiased squared MMD of (N,D) against (M,D) with kernel (x·y / D + 1)^degree."""
    num_real, num_fake = len(real), len(fake)
    if min(num_real, num_fake) < 2:
        raise UserError(f"KID needs at least 2 samples on each side, got {num_real} and {num_fake}")
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    within_real, within_fake, across = (_kernel(x, y, degree) for x, y in ((real, real), (fake, fake), (real, fake)))
    sum_real = (within_real.sum() - np.trace(within_real)) / (num_real * (num_real - 1))
    sum_fake = (within_fake.sum() - np.trace(within_fake)) / (num_fake * (num_fake - 1))
    return float(sum_real + sum_fake - 2 * across.mean())


def _kernel(x: np.ndarray, y: np.ndarray, degree: int = 3) -> np.ndarray:
    """(N,D), (M,D) → (N,M)."""
    values: np.ndarray = (x @ y.T / x.shape[1] + 1.0) ** degree
    return values


def kid_resamples(
    real: np.ndarray, fake: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """KID in every resample of all samples of both sets, float64 (R,). Pairs of a sample with itself are left out, also
    where a resample holds it several times. Above 2000 samples, each is compared with those of its own group (a block
    estimator, Zaremba et al. 2013), so that the work grows with N and not with N²."""
    num_groups = max(1, -(-max(len(real), len(fake)) // _GROUP))
    drawn_real = resample_counts(len(real), num_resamples=num_resamples, seed=seed, stream=1)
    drawn_fake = resample_counts(len(fake), num_resamples=num_resamples, seed=seed)
    groups = zip(np.array_split(np.arange(len(real)), num_groups), np.array_split(np.arange(len(fake)), num_groups))
    values = np.zeros(num_resamples)
    for of_real, of_fake in groups:
        x, y = real[of_real].astype(np.float64), fake[of_fake].astype(np.float64)
        v, w = drawn_real[:, of_real].astype(np.float64), drawn_fake[:, of_fake].astype(np.float64)
        across = ((v @ _kernel(x, y)) * w).sum(axis=1) / (v.sum(axis=1) * w.sum(axis=1))
        values += _within(x, v) + _within(y, w) - 2 * across
    return values / num_groups


def _within(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean kernel over the pairs of different samples in each resample: (N,D), (R,N) → (R,)."""
    kernel = _kernel(x, x)
    np.fill_diagonal(kernel, 0.0)
    pairs = counts.sum(axis=1) ** 2 - (counts**2).sum(axis=1)
    sums = ((counts @ kernel) * counts).sum(axis=1)
    return np.divide(sums, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)  # a resample of one sample has none


def kid(
    real: np.ndarray, fake: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) over random subsets. Subsets shrink to the number of samples where fewer are there."""
    size = min(subset_size, len(real), len(fake))
    generator = np.random.default_rng(seed)
    values = [
        polynomial_mmd(
            real[generator.choice(len(real), size, replace=False)],
            fake[generator.choice(len(fake), size, replace=False)],
        )
        for _ in range(num_subsets)
    ]
    return float(np.mean(values)), float(np.std(values))
