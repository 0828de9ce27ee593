"""Mean and standard deviation of latents over a whole data set, merged from exact sums of each shard.

For a KL autoencoder the latent that training sees is a sample of N(mean, var). Its variance is var(mean) + E[var], so
nothing has to be drawn: the shard sums of mean, mean² and var say it exactly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class LatentSums:
    """Sums over one shard, per channel, in float64."""

    def __init__(self, num_channels: int, has_variance: bool) -> None:
        self.num_channels = num_channels
        self.has_variance = has_variance
        self.count = 0
        self.total = np.zeros(num_channels)
        self.squares = np.zeros(num_channels)

    def add(self, stored: np.ndarray) -> None:
        """Add one stored latent (S,h,w) as it was rounded for storage."""
        values = stored.astype(np.float64).reshape(stored.shape[0], -1)
        mean = values[: self.num_channels]
        self.count += mean.shape[1]
        self.total += mean.sum(1)
        self.squares += (mean * mean).sum(1)
        if self.has_variance:
            self.squares += np.exp(np.clip(values[self.num_channels :], -30.0, 20.0)).sum(1)

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sum": self.total.tolist(), "sum_of_squares": self.squares.tolist()}


def merge(shards: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Latent mean and std per channel, and scale_factor = 1 / std over all values. None without latents."""
    count = sum(s["count"] for s in shards)
    if count == 0:
        return None
    channels = range(len(shards[0]["sum"]))
    total = [math.fsum(s["sum"][c] for s in shards) for c in channels]
    squares = [math.fsum(s["sum_of_squares"][c] for s in shards) for c in channels]
    mean = [t / count for t in total]
    std = [math.sqrt(max(q / count - m * m, 0.0)) for q, m in zip(squares, mean)]
    all_mean = math.fsum(total) / (count * len(total))
    all_std = math.sqrt(max(math.fsum(squares) / (count * len(total)) - all_mean**2, 0.0))
    return {"latent_mean": mean, "latent_std": std, "scale_factor": 1.0 / all_std if all_std > 0 else 1.0}
