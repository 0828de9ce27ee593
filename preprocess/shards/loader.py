"""Shards → typed batches for rank r of n, in one global order, resumable at any batch and at any number of ranks.

Legend: B batch of one rank, H/W pixels, S stored channels, h/w latent grid.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from preprocess.shards.cache import ShardCache
from preprocess.shards.manifest import Manifest, folder_of, load_manifest
from preprocess.shards.order import GlobalOrder, hash64
from preprocess.shards.reader import ShardReader
from preprocess.shards.receipt import load_receipt
from preprocess.shards.sample import Batch, latent_member

_MAX_OPEN_SHARDS = 256


class ShardLoader:
    """Endless batches of one split, epoch after epoch (`num_epochs` ends it, with a shorter last batch).

    The global batch k is samples [k·G, (k+1)·G) of one stream, G = batch_size × world_size, and rank r takes slice r:
    the stream depends on seed and epoch only. `flip`: a seeded coin per (epoch, sample) picks mirrored pixels and the
    encoded flip; without cached flips, latents are never mirrored and neither are their pixels.
    lr_size: which SR condition comes along (0: none); of several, each global batch has one, drawn by seed and place.
    autoencoder_identity: refuse shards whose latents come from another autoencoder.
    Remote shards pass through `cache_dir`, at most `cache_bytes`, once for all processes of a machine; every shard's
    checksum is checked on first read.
    num_threads: that read and decode, and as many that fetch. batches_ahead: read before they are asked for; None is
    twice num_threads. shards_ahead: of the next window of shards, fetched and checked while this one is read.
    """

    def __init__(
        self,
        url: str,
        *,
        split: str = "train",
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        flip: bool = True,
        lr_size: int | tuple[int, ...] = 0,
        pixels: bool = True,
        latents: bool = True,
        autoencoder_identity: str | None = None,
        num_threads: int = 2,
        batches_ahead: int | None = None,
        shards_ahead: int = 64,
        cache_dir: str | None = None,
        cache_bytes: int = 64 << 30,
        shuffle: bool = True,
        window_shards: int = 64,
        num_epochs: int | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"batch_size {batch_size}, rank {rank} of {world_size}: not a possible combination")
        self.url, self.split = folder_of(url), split
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.manifest = load_manifest(url)
        self.lr_sizes = tuple(size for size in (lr_size if isinstance(lr_size, tuple) else (lr_size,)) if size)
        _check_request(self.manifest, url, split, self.lr_sizes, autoencoder_identity)
        self.with_pixels = pixels
        self.with_latents = latents and self.manifest.latent_shape is not None
        self.flip = flip and (self.manifest.flips or not (self.with_latents or self.lr_sizes))
        self.num_epochs = num_epochs
        self.entries = [entry for entry in self.manifest.shards if entry.split == split and entry.num_samples]
        sizes = [entry.num_samples for entry in self.entries]
        self.order = GlobalOrder(sizes, seed=seed, shuffle=shuffle, window_shards=window_shards)
        self.num_samples = self.order.num_samples
        self._cache = ShardCache(self.url, cache_dir, cache_bytes)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self._shard_locks = [threading.Lock() for _ in self.entries]
        self._position = 0
        self._generation = 0
        self._num_ahead = 2 * num_threads if batches_ahead is None else batches_ahead
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="loader")
        self._shards_ahead, self._fetched_window = shards_ahead, -1
        self._fetchers = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="fetcher")

    # --- iteration ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on. The position advances when a batch is handed out, not when it is read
        ahead, so `state_dict` is exact at any moment."""
        self._generation += 1
        generation = self._generation
        ahead: deque[tuple[int, Future[Batch]]] = deque()
        position = self._position
        try:
            while generation == self._generation:
                while len(ahead) < max(1, self._num_ahead) and (bounds := self._slice(position)) is not None:
                    self._fetch_ahead(position)
                    position = bounds[2]
                    lr_size = self._lr_size_at(bounds[2])
                    ahead.append((position, self._pool.submit(self._read_batch, bounds[0], bounds[1], lr_size)))
                if not ahead:
                    return
                end, future = ahead.popleft()
                batch = future.result()
                self._position = end
                if batch.ids:
                    yield batch
        finally:
            for _, future in ahead:
                future.cancel()

    def _fetch_ahead(self, position: int) -> None:
        """Have the window of shards after that of `position` fetched, and at first that one itself. Each rank begins
        at another shard, so that those of a machine fetch different ones at a time."""
        if not self._shards_ahead or (window := self.order.window_at(position) + 1) == self._fetched_window:
            return
        wanted = [window] if self._fetched_window == window - 1 else [window - 1, window]
        self._fetched_window = window
        for number in wanted:
            if self.num_epochs is not None and number >= self.num_epochs * self.order.num_windows:
                break
            shards = self.order.window(number)[: self._shards_ahead]
            start = self.rank * len(shards) // self.world_size
            for shard in shards[start:] + shards[:start]:
                self._fetchers.submit(self._reader, shard)  # an error shows when the shard is read

    def _slice(self, position: int) -> tuple[int, int, int] | None:
        """(first, last, end of the global batch) in the stream for this rank; None when the epochs are over."""
        size = self.batch_size * self.world_size
        limit = None if self.num_epochs is None else self.num_epochs * self.num_samples
        if limit is not None and position >= limit:
            return None
        end = position + size if limit is None else min(position + size, limit)
        first = min(position + self.rank * self.batch_size, end)
        return first, min(first + self.batch_size, end), end

    def _lr_size_at(self, end: int) -> int:
        """The condition of the global batch that ends at stream position `end`: the same on every rank."""
        if len(self.lr_sizes) < 2:
            return self.lr_sizes[0] if self.lr_sizes else 0
        return self.lr_sizes[int(hash64(np.array([end]), self.order.seed, 4)[0] % np.uint64(len(self.lr_sizes)))]

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Whole passes over the split so far."""
        return self._position // self.num_samples

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is. Equal on all ranks after the same number of batches, valid for any world size."""
        return {
            "position": self._position,
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
            "window_shards": self.order.window_shards,
            "split": self.split,
            "manifest": self.manifest.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Another shard set, split or order raises `UserError` naming it."""
        now = self.state_dict()
        for name in ("manifest", "split", "seed", "shuffle", "window_shards"):
            if state.get(name) != now[name]:
                raise UserError(f"loader state has {name} {state.get(name)!r}, but this loader {now[name]!r}")
        self._position = int(state["position"])
        self._generation += 1

    def close(self) -> None:
        """Stop reading ahead and drop the open shards."""
        self._generation += 1
        self._cache.close()
        for pool in (self._pool, self._fetchers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._readers.clear()

    def __enter__(self) -> ShardLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- reading ------------------------------------------------------------------------------------------------------

    def _reader(self, shard: int) -> ShardReader:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        with self._shard_locks[shard]:  # one thread fetches and checks; others wait for this shard only
            with self._lock:
                if shard in self._readers:
                    return self._readers[shard]
            entry = self.entries[shard]
            with self._cache.open(entry) as file:
                reader = ShardReader(file, load_receipt(self.url, entry.name), entry, self.manifest)
            with self._lock:
                self._readers[shard] = reader
                while len(self._readers) > _MAX_OPEN_SHARDS:
                    self._readers.popitem(last=False)
            return reader

    def _read_batch(self, first: int, last: int, lr_size: int) -> Batch:
        epochs, numbers = self.order.stream(first, last)
        flips = self.order.coins(epochs, numbers) if self.flip else np.zeros(len(numbers), dtype=bool)
        places = [self.order.locate(int(number)) for number in numbers]
        samples = [(self._reader(shard), position) for shard, position in places]
        batch = Batch(ids=[reader.ids[position] for reader, position in samples])
        if not samples:
            return batch
        if self.with_pixels:
            batch.pixels = _pixels(samples, flips)
        if self.with_latents:
            batch.latents = _latents(samples, flips, 0)
        if lr_size:
            batch.condition = _latents(samples, flips, lr_size)
        return batch


def _pixels(samples: list[tuple[ShardReader, int]], flips: np.ndarray) -> Tensor:
    arrays = [reader.pixels(position) for reader, position in samples]
    stacked = np.stack([array[:, ::-1] if flip else array for array, flip in zip(arrays, flips)])
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))


def _latents(samples: list[tuple[ShardReader, int]], flips: np.ndarray, lr_size: int) -> Tensor:
    """float32 (B,S,h,w): the image's latent, or that of its mirror where `flips` says so."""
    names = (latent_member(False, lr_size), latent_member(True, lr_size))
    stored = np.stack([reader.latent(position, names[bool(flip)]) for (reader, position), flip in zip(samples, flips)])
    return torch.from_numpy(stored).float()


def _check_request(manifest: Manifest, url: str, split: str, lr_sizes: tuple[int, ...], identity: str | None) -> None:
    if not manifest.splits.get(split):
        raise UserError(f"{url} has no split {split!r}; it has {', '.join(manifest.splits) or 'none'}")
    for lr_size in lr_sizes:
        if lr_size not in manifest.lr_sizes:
            raise UserError(
                f"{url} has no condition latents for --lr-size {lr_size}; it has {manifest.lr_sizes or 'none'}: "
                f"preprocess with --lr-sizes {lr_size}"
            )
    if identity is not None and identity != manifest.autoencoder_identity:
        found = manifest.autoencoder_identity
        raise UserError(
            f"{url} was made with {'autoencoder ' + found[:12] if found else 'no autoencoder'}, but the model's is "
            f"{identity[:12]}; preprocess again with the model's autoencoder"
        )
