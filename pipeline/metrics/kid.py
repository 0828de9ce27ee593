"""KID: unbiased squared MMD with a cubic polynomial kernel (Binkowski et al. 2018). Legend: N samples, D features."""

from __future__ import annotations

import numpy as np

from pipeline.errors import UserError


def polynomial_mmd(real: np.ndarray, fake: np.ndarray, degree: int = 3) -> float:
    """Unbiased squared MMD of (N,D) against (M,D) with kernel (x·y / D + 1)^degree."""
    num_real, num_fake = len(real), len(fake)
    if min(num_real, num_fake) < 2:
        raise UserError(f"KID needs at least 2 samples on each side, got {num_real} and {num_fake}")
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    dim = real.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / dim + 1.0) ** degree

    within_real, within_fake, across = kernel(real, real), kernel(fake, fake), kernel(real, fake)
    sum_real = (within_real.sum() - np.trace(within_real)) / (num_real * (num_real - 1))
    sum_fake = (within_fake.sum() - np.trace(within_fake)) / (num_fake * (num_fake - 1))
    return float(sum_real + sum_fake - 2 * across.mean())


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
