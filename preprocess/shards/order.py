"""The global sample order of the loader: a pure function of (seed, epoch), the same for any number of ranks.

Shards are shuffled, then samples within windows of shards, so that a remote set needs only a window of shards at hand.
All randomness is a 64-bit integer hash (splitmix64, Steele et al. 2014) and a sort: no library's generator to change.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(values: np.ndarray, *key: int) -> np.ndarray:
    """uint64 hashes of `values`, different for every `key`."""
    state = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        for part in (*key, 0):
            state = state + _GOLDEN * np.uint64(2 * (part % (1 << 62)) + 1)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


class GlobalOrder:
    """Order of the samples of one split, epoch by epoch. Sample numbers count through the shards in manifest order."""

    def __init__(self, shard_sizes: list[int], *, seed: int, shuffle: bool, window_shards: int) -> None:
        self.first = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        self.num_samples = int(self.first[-1])
        self.seed, self.shuffle, self.window_shards = seed, shuffle, max(1, window_shards)
        self._epochs: dict[int, np.ndarray] = {}
        self._ends: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """All sample numbers in the order of `epoch`, int64 (num_samples,)."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if abs(e - epoch) <= 1}
            self._epochs[epoch] = self._shuffled(epoch)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        shard_order = self._shards(epoch)
        samples = hash64(np.arange(self.num_samples), self.seed, epoch, 2)
        parts = []
        for start in range(0, len(shard_order), self.window_shards):
            shards = shard_order[start : start + self.window_shards]
            numbers = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in shards])
            parts.append(numbers[np.argsort(samples[numbers], kind="stable")])
        return np.concatenate(parts)

    def window_at(self, position: int) -> int:
        """The window of shards, counted through all epochs, that holds a position of the endless stream."""
        epoch, place = divmod(position, self.num_samples)
        if epoch not in self._ends:
            self._ends = {epoch: np.cumsum(np.diff(self.first)[self._shards(epoch)])}
        shard = int(np.searchsorted(self._ends[epoch], place, side="right"))
        return epoch * self.num_windows + shard // self.window_shards

    def window(self, number: int) -> list[int]:
        """The shards of a window, counted as by `window_at`."""
        epoch, window = divmod(number, self.num_windows)
        start = window * self.window_shards
        return [int(shard) for shard in self._shards(epoch)[start : start + self.window_shards]]

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return -(-(len(self.first) - 1) // self.window_shards)

    def _shards(self, epoch: int) -> np.ndarray:
        """All shards in the order of `epoch`."""
        shards = np.arange(len(self.first) - 1)
        return np.argsort(hash64(shards, self.seed, epoch, 1), kind="stable") if self.shuffle else shards

    def stream(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, sample numbers) at positions [start, stop) of the endless stream of epochs."""
        positions = np.arange(start, stop)
        epochs = positions // self.num_samples
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self.epoch(int(epoch))[positions[here] % self.num_samples]
        return epochs, numbers

    def coins(self, epochs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """One fair coin per (epoch, sample), bool: whether the sample is mirrored."""
        coins = np.zeros(len(numbers), dtype=bool)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            coins[here] = (hash64(numbers[here], self.seed, int(epoch), 3) >> np.uint64(63)).astype(bool)
        return coins

    def locate(self, number: int) -> tuple[int, int]:
        """(shard, position in it) of a sample number."""
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        return shard, int(number - self.first[shard])
