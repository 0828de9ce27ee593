"""Fréchet distance between Gaussians (FID, Heusel et al. 2017), from statistics that stream and merge.

Legend: N samples, D feature dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError
from pipeline.metrics.bootstrap import NUM_RESAMPLES, mean_resamples

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


def frechet_resamples(
    real: np.ndarray, fake: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Fréchet distance of two sets of features (N,D), (M,D) in every resample, to first order, float64 (R,).

    How far one sample moves the distance is its influence; a resample moves it by the mean influence of what it holds
    (the nonparametric delta method: Efron & Tibshirani 1993, chapter 22). This takes two decompositions where a plain
    bootstrap takes as many as there are resamples, and where samples are few it is nearer to the truth: repeats in a
    resample take away from the rank of its covariance. The distance itself is biased upwards at few samples, by about
    the same for every model; neither way shows that in an interval.
    """
    ours, theirs = FeatureStatistics.of(real), FeatureStatistics.of(fake)
    there, back = _transport(ours.covariance(), theirs.covariance())
    difference = ours.mean - theirs.mean
    moved_real = _influence(real, ours, 2 * difference, there)
    moved_fake = _influence(fake, theirs, -2 * difference, back)
    distance = frechet_distance(ours, theirs)
    return (
        distance
        + mean_resamples(moved_real, num_resamples=num_resamples, seed=seed, stream=1)
        + mean_resamples(moved_fake, num_resamples=num_resamples, seed=seed)
    )


def _transport(cov1: np.ndarray, cov2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Optimal transport maps between centred Gaussians, C1 → C2 and C2 → C1. The distance's derivatives by C1 and C2
    are 1 minus these."""
    values, vectors = np.linalg.eigh(cov1)
    values = values.clip(min=1e-12 * values.max())
    root, inverse = (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T
    product = root @ cov2 @ root
    values, vectors = np.linalg.eigh((product + product.T) / 2)
    values = np.sqrt(values.clip(min=1e-12 * values.max()))
    return inverse @ ((vectors * values) @ vectors.T) @ inverse, root @ ((vectors / values) @ vectors.T) @ root


def _influence(
    features: np.ndarray, statistics: FeatureStatistics, slope: np.ndarray, transport: np.ndarray
) -> np.ndarray:
    """Influence of every sample (N,), with mean 0. slope: derivative by the mean (D,)."""
    matrix = np.eye(len(slope)) - transport
    parts = []
    for start in range(0, len(features), _BLOCK):
        block = features[start : start + _BLOCK].astype(np.float64) - statistics.mean
        parts.append(block @ slope + ((block @ matrix) * block).sum(axis=1))
    influence = np.concatenate(parts)
    centred: np.ndarray = influence - influence.mean()
    return centred
