"""Builds shards: decode threads → encoder → publisher, three stages that overlap and hold each other back.

The same code runs in-line and inside a Ray actor, so both make the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.storage import sha256_bytes
from preprocess.config import PreprocessConfig
from preprocess.encode import LatentEncoder, StoredEncoder
from preprocess.growth import Carrier
from preprocess.pictures.decoding import Crop, DecodedImage, decode_ahead
from preprocess.pictures.images import use_own_size_limit
from preprocess.plan import ShardPlan
from preprocess.quarantine import quarantine
from preprocess.retry import RetryCounter, full_disk_explained
from preprocess.shards.publish import Publisher
from preprocess.shards.receipt import Receipt
from preprocess.shards.sample import Sample, member_suffixes
from preprocess.sources.base import Source


@dataclass(slots=True)
class StageSeconds:
    """Where the time of a builder went. `wait_*`: the encoder stood still because of that stage."""

    total: float = 0.0
    encode: float = 0.0
    wait_decode: float = 0.0
    wait_publish: float = 0.0
    retries: int = 0

    def plus(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))


@dataclass(slots=True)
class Built:
    """News from a builder: `num_samples` more encoded, perhaps a shard published. `seconds` is the state so far."""

    seconds: StageSeconds
    num_samples: int = 0
    receipt: Receipt | None = None


@dataclass
class ShardBuilder:
    """Builds shards of one plan. autoencoder None: pixels only."""

    config: PreprocessConfig
    source: Source
    autoencoder: StoredEncoder | None
    facts: dict[str, Any] | None
    plan_hash: str
    counter: RetryCounter = field(default_factory=RetryCounter)
    carrier: Carrier | None = None
    """Where the samples of shards of copies come from."""

    def build(self, shards: Iterable[ShardPlan]) -> Generator[Built, None, None]:
        """Build and publish `shards`; yields news after each batch and for each published shard."""
        use_own_size_limit()
        config = self.config
        shards = list(shards)
        copies, fresh = [s for s in shards if s.copies], [s for s in shards if not s.copies]
        encoder = LatentEncoder(self.autoencoder, config) if self.autoencoder else None
        shape = self.facts["latent_shape"] if self.facts else None
        channels = self.facts["latent_channels"] if self.facts else 0
        suffixes = member_suffixes(config.pixel_format, encoder is not None, config.flips, config.lr_sizes)
        publisher = Publisher(config, self.plan_hash, suffixes, shape, channels, self.counter)
        seconds = StageSeconds()
        start = time.perf_counter()

        def news(num_samples: int = 0, receipt: Receipt | None = None) -> Built:
            seconds.total = time.perf_counter() - start
            seconds.wait_publish = publisher.wait_seconds
            seconds.retries = self.counter.count
            return Built(seconds, num_samples, receipt)

        try:
            with (
                full_disk_explained(config.dest),
                contextlib.closing(self._batches(fresh, encoder is not None, seconds)) as batches,
            ):
                for shard in copies:
                    assert self.carrier is not None
                    for samples in self.carrier.samples(shard):
                        publisher.put(shard, samples)
                        yield news(len(samples))
                    publisher.close_shard(shard, [])
                for shard, crops, rejects in batches:
                    if crops:
                        publisher.put(shard, self._encode(encoder, shard, crops, seconds))
                        yield news(len(crops))
                    if rejects is not None:
                        publisher.close_shard(shard, rejects)
                    for receipt in publisher.receipts():
                        yield news(receipt=receipt)
                publisher.close()
                for receipt in publisher.receipts():
                    yield news(receipt=receipt)
        except BaseException:
            publisher.abort()
            raise

    def _batches(
        self, shards: Iterable[ShardPlan], has_latents: bool, seconds: StageSeconds
    ) -> Generator[tuple[ShardPlan, list[tuple[int, Crop]], list[dict[str, Any]] | None], None, None]:
        """(shard, batch of (position, crop), None), and with the shard's last batch its rejects.

        Positions of rejected samples stay empty, and a batch covers fixed positions: what is encoded together never
        depends on anything but the plan.
        """
        size = self.config.batch_size
        batch: list[tuple[int, Crop]] = []
        rejects: list[dict[str, Any]] = []
        position = 0
        has_flips = has_latents and self.config.flips
        with contextlib.closing(decode_ahead(shards, self.source, self.config, has_flips, self.counter)) as images:
            while True:
                start = time.perf_counter()
                item = next(images, None)
                seconds.wait_decode += time.perf_counter() - start
                if item is None:
                    return
                shard, decoded = item
                if decoded is None:
                    yield shard, batch, rejects
                    batch, rejects, position = [], [], 0
                    continue
                if decoded.reject:
                    rejects.append(self._reject(decoded))
                for number in range(decoded.planned.num_crops):
                    if not decoded.reject:
                        batch.append((position, decoded.crops[number]))
                    position += 1
                    if position % size == 0 and batch:
                        yield shard, batch, None
                        batch = []

    def _encode(
        self, encoder: LatentEncoder | None, shard: ShardPlan, crops: list[tuple[int, Crop]], seconds: StageSeconds
    ) -> list[Sample]:
        samples = [Sample(shard.first_index + position, crop.info, crop.pixels) for position, crop in crops]
        if encoder is None:
            return samples
        start = time.perf_counter()
        size = self.config.batch_size
        pixels = np.zeros((size, *crops[0][1].array.shape), np.uint8)
        rows = [position % size for position, _ in crops]
        for row, (_, crop) in zip(rows, crops):
            pixels[row] = crop.array
        for name, stored in encoder.encode(pixels).items():
            for sample, row in zip(samples, rows):
                if not np.isfinite(stored[row]).all():
                    raise UserError(
                        f"{sample.info['id']}: {name} is not finite in {self.config.dtype}; "
                        "try --dtype float32, and check the autoencoder"
                    )
                sample.latents[name] = stored[row]
        seconds.encode += time.perf_counter() - start
        return samples

    def _reject(self, decoded: DecodedImage) -> dict[str, Any]:
        reject, image = decoded.reject, decoded.planned.image
        assert reject is not None
        if self.config.policy == "fail":
            raise UserError(
                f"{image} cannot be used ({reject}); mend or remove it, or use --policy skip or quarantine "
                "(preprocess check lists all such images)"
            )
        if self.config.policy == "quarantine" and decoded.data:
            quarantine(self.config, image, decoded.data, self.counter)
        return {
            "image": image,
            "reason": reject.reason,
            "detail": reject.detail,
            "num_samples": decoded.planned.num_crops,
            "sha256": sha256_bytes(decoded.data) if decoded.was_read else "",
        }
