"""Fréchet distance between Gaussians (FID, Heusel et al. 2017), from statistics that stream and merge.

Legend: N samples, D feature dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

_BLOCK = 8192


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean (D,) and scatter matrix sum (x-mean)(x-mean)^T (D,D), float64. `merge` is exact and associative
    up to rounding (Chan et al. 1983), so any split of the samples over workers gives the same figure."""

    num: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureStatistics:
        """Statistics of features (N,D)."""
        if features.ndim != 2:
            raise UserError(f"features must be (N, D), got {features.shape}")
        if not np.isfinite(features).all():
            raise UserError("features hold a value that is not finite; the pictures or the feature network are broken")
        statistics = cls.empty(features.shape[1])
        for start in range(0, len(features), _BLOCK):  # float64 copies of all of them would be gigabytes
            block = features[start : start + _BLOCK].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            statistics = statistics.merge(cls(len(block), mean, block.T @ block))
        return statistics

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        num = self.num + other.num
        if num == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.num / num)
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.num * other.num / num)
        return FeatureStatistics(num, mean, scatter)

    def covariance(self, name: str = "FID") -> np.ndarray:
        """Unbiased covariance (D,D). Needs more samples than dimensions, else the distance means nothing."""
        dim = len(self.mean)
        if self.num <= dim:
            raise UserError(
                f"{name} over {dim} features needs at least {dim + 1} samples for its covariance, got {self.num}; "
                "evaluate more samples, or use KID"
            )
        return self.scatter / (self.num - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics, name: str = "FID") -> float:
    """|m1-m2|² + tr(C1 + C2 - 2 (C1 C2)^½).

    The trace of the root is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, which is symmetric: no complex
    numbers and no added diagonal, unlike a matrix square root of the product.
    """
    difference = first.mean - second.mean
    cov1, cov2 = first.covariance(name), second.covariance(name)
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ cov2 @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    trace = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(difference @ difference + np.trace(cov1) + np.trace(cov2) - 2 * trace)
