"""A short probe: how many bytes and seconds samples will take. It reads a few images and writes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.progress import format_seconds
from preprocess.config import PreprocessConfig
from preprocess.decoding import decode_image
from preprocess.encode import LatentEncoder, StoredEncoder
from preprocess.images import use_own_size_limit
from preprocess.plan import Plan, PlannedImage
from preprocess.retry import RetryCounter
from preprocess.sample import Sample, encode_members
from preprocess.sources.base import Source
from preprocess.sources.listing import said

_NUM_PROBES = 8
_BLOCK = 512


@dataclass(frozen=True)
class Probe:
    """Per sample: bytes in the tar, seconds of one decode thread, seconds of the encoder."""

    bytes: float
    decode_seconds: float
    encode_seconds: float


def probe(config: PreprocessConfig, source: Source, encoder: StoredEncoder | None, images: list[str]) -> Probe:
    """Measure on up to eight of `images`, spread evenly; images that cannot be used are passed over."""
    use_own_size_limit()
    chosen = images[:: max(1, len(images) // _NUM_PROBES)][:_NUM_PROBES]
    has_flips = encoder is not None and config.flips
    for image in chosen[:1]:  # the first image also loads the codecs
        decode_image(PlannedImage(image, 0, 1), source, config, has_flips, RetryCounter())
    start = time.perf_counter()
    decoded = [decode_image(PlannedImage(image, 0, 1), source, config, has_flips, RetryCounter()) for image in chosen]
    decode_seconds = (time.perf_counter() - start) / max(1, len(chosen))
    crops = [crop for image in decoded for crop in image.crops]
    if not crops:
        return Probe(3.0 * config.size**2, decode_seconds, 0.0)
    samples = [Sample(0, crop.info, crop.pixels) for crop in crops]
    encode_seconds = 0.0
    if encoder is not None:
        latent_encoder = LatentEncoder(encoder, config)
        batch = np.stack([crops[n % len(crops)].array for n in range(config.batch_size)])
        latent_encoder.encode(batch)  # the first call also sets the device up
        start = time.perf_counter()
        latents = latent_encoder.encode(batch)
        encode_seconds = (time.perf_counter() - start) / config.batch_size
        for sample in samples:
            sample.latents = {name: stored[0] for name, stored in latents.items()}
    sizes = [_tar_bytes(sample, config.pixel_format) for sample in samples]
    return Probe(sum(sizes) / len(sizes), decode_seconds, encode_seconds)


def _tar_bytes(sample: Sample, pixel_format: str) -> int:
    return sum(_BLOCK + len(data) + -len(data) % _BLOCK for data in encode_members(sample, pixel_format).values())


def samples_per_shard(config: PreprocessConfig, found: Probe) -> int:
    """Samples that fill `--shard-bytes`, in whole encode batches. Every latent size is known from the probe."""
    whole = int(config.shard_bytes / found.bytes)
    return max(config.batch_size, whole // config.batch_size * config.batch_size)


@dataclass(frozen=True)
class Expected:
    """What `--dry-run` says: text to people, facts to programs (bytes, seconds)."""

    text: str
    facts: dict[str, Any]


def expected(config: PreprocessConfig, plan: Plan, found: Probe) -> Expected:
    """What a run would do."""
    workers = max(1, config.workers)
    per_sample = max(found.decode_seconds / max(1, config.decode_threads), found.encode_seconds) / workers
    limit = "encoder" if found.encode_seconds * config.decode_threads >= found.decode_seconds else "decoding"
    splits = ", ".join(f"{name} {num}" for name, num in plan.facts["splits"].items())
    encoder = plan.facts["encoder"]
    lines = [
        f"source     {config.source} {config.source_url}: {plan.num_images} images, {_bytes(plan.source_bytes)}",
        f"left out:  {said(plan.left_out) or 'nothing'}",
        f"samples    {plan.num_samples} of {config.size}x{config.size} ({splits}), crop {config.crop}",
        f"shards     {len(plan.shards)} of up to {config.samples_per_shard} samples, in {config.dest}",
        f"latents    {encoder['latent_shape'] if encoder else 'none (pixels only)'}",
        f"expected   {_bytes(found.bytes * plan.num_samples)}",
        f"time       about {format_seconds(per_sample * plan.num_samples)} with {workers} "
        f"worker{'s' if workers > 1 else ''} (limited by: {limit})",
        f"plan       {plan.hash}",
    ]
    facts = {
        "source": config.source,
        "source_url": config.source_url,
        "dest": config.dest,
        "num_images": plan.num_images,
        "source_bytes": plan.source_bytes,
        "left_out": plan.left_out,
        "num_samples": plan.num_samples,
        "size": config.size,
        "splits": plan.facts["splits"],
        "num_shards": len(plan.shards),
        "latent_shape": encoder["latent_shape"] if encoder else None,
        "bytes": round(found.bytes * plan.num_samples),
        "seconds": per_sample * plan.num_samples,
        "limited_by": limit,
        "plan": plan.hash,
    }
    return Expected("\n".join(lines), facts)


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
