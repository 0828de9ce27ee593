"""Bootstrap intervals: how much a figure would move with another sample of pictures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def mean_interval(
    values: np.ndarray, *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of per-picture values (N,). One value gives an interval of width zero."""
    values = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for i in range(num_resamples):
        means[i] = values[generator.integers(0, len(values), len(values))].mean()
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def set_interval(
    figure: Callable[[np.ndarray, np.ndarray], float],
    real: np.ndarray,
    fake: np.ndarray,
    *,
    num_resamples: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of a figure of two sets of features, as value ± 1.96 standard deviations over resamples.

    Resampled sets hold repeats, which biases such figures, so only the spread of the resamples is used, not their mean.
    """
    generator = np.random.default_rng(seed)
    values = [
        figure(real[generator.integers(0, len(real), len(real))], fake[generator.integers(0, len(fake), len(fake))])
        for _ in range(num_resamples)
    ]
    value, spread = figure(real, fake), 1.96 * float(np.std(values, ddof=1))
    return value - spread, value + spread
