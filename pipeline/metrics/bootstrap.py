"""Bootstrap intervals: how much a figure would move with another sample of pictures.

Resamples are drawn from a seed and the number of samples alone. So two models measured on the same samples have
resamples that pair: what one draw gives for the one and for the other differs as the models do, not as the pictures do.

Legend: N samples, R resamples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 1000
_ROWS = 64


@functools.lru_cache(maxsize=2)
def resample_counts(num: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0, stream: int = 0) -> np.ndarray:
    """How often each of `num` samples is in each resample, uint16 (R,N); every row sums to N. `stream`: 0 for what is
    measured, 1 for a second set beside it. The numbers are the same in every version of NumPy: `RandomState` is frozen.
    """
    generator = np.random.RandomState([seed % 2**32, stream, num])
    counts = np.empty((num_resamples, num), dtype=np.uint16)
    for row in counts:
        row[:] = np.bincount(generator.randint(0, num, num), minlength=num)
    counts.setflags(write=False)
    return counts


def mean_resamples(
    values: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0, stream: int = 0
) -> np.ndarray:
    """Mean of per-picture values (N,) in every resample, float64 (R,)."""
    values = np.asarray(values, dtype=np.float64)
    counts = resample_counts(len(values), num_resamples=num_resamples, seed=seed, stream=stream)
    if not np.isfinite(values).all():  # an infinite PSNR that a resample lacks is not 0 × infinity
        return np.array([np.repeat(values, row).mean() for row in counts])
    starts = range(0, num_resamples, _ROWS)  # float64 copies of all rows would be gigabytes
    return np.concatenate([counts[i : i + _ROWS].astype(np.float64) @ values for i in starts]) / len(values)


def percentile_interval(resamples: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a mean, from its resamples (R,)."""
    low, high = np.percentile(resamples, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def mean_interval(
    values: np.ndarray, *, level: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of per-picture values (N,). One value gives an interval of width zero."""
    return percentile_interval(mean_resamples(values, num_resamples=num_resamples, seed=seed), level=level)


def spread_interval(value: float, resamples: np.ndarray) -> tuple[float, float]:
    """95 % interval of a figure of two sets as value ± 1.96 standard deviations over its resamples (R,): resampled sets
    hold repeats, which may bias such figures, so their spread is used and not their place. Resamples that have no value
    (a KID of one sample) are left out."""
    with np.errstate(invalid="ignore"):
        spread = 1.96 * float(np.nanstd(resamples, ddof=1))
    return value - spread, value + spread


def paired_interval(one: float, other: float, ones: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """95 % interval of `one - other`, two figures of the same samples, from their resamples by the same draws."""
    return spread_interval(one - other, np.asarray(ones, float) - np.asarray(others, float))
