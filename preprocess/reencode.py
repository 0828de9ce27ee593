"""`latentzoom preprocess reencode SET DEST --autoencoder NAME`: latents by another encoder, from a set's pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from pipeline.command_line import plain_help
from pipeline.errors import MANY, require_range
from preprocess.config import LARGEST_SAMPLE, MOST_THREADS, MOST_WORKERS, PreprocessConfig
from preprocess.shards.manifest import load_manifest


@plain_help
@dataclass(frozen=True, kw_only=True)
class ReencodeConfig:
    """What to move where. Everything that is not asked for here is as the set has it."""

    source_set: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SET")]
    """Folder of the finished set (any fsspec URL). It is only read."""
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """Folder for the new set: the same ids, pixels and splits, other latents."""
    autoencoder: str
    """The new encoder: a bundle or a diffusers folder (URL), or models:/NAME@champion."""
    flips: bool = True
    """Also encode the mirrored image."""
    lr_sizes: tuple[int, ...] | None = None
    """Input sizes of cached conditions; left out: those of the set."""
    dtype: Literal["float16", "float32"] | None = None
    """Number format of latents; left out: that of the set."""
    batch_size: int = 16
    """Images encoded at once. Part of the plan."""
    samples_per_shard: int = 1024
    """Samples in one shard."""
    device: str = "cpu"
    """Where the encoder runs: cpu, cuda, cuda:1."""
    workers: int = 0
    """Ray actors that build shards; 0: this process."""
    gpus_per_worker: float = 0.0
    """GPUs of one actor."""

    def __post_init__(self) -> None:
        require_range(self, 1, LARGEST_SAMPLE, "lr_sizes")
        require_range(self, 1, MANY, "batch_size", "samples_per_shard")
        require_range(self, 0, MOST_WORKERS, "workers")
        require_range(self, 0, MOST_THREADS, "gpus_per_worker")

    def as_run(self) -> PreprocessConfig:
        """The preprocessing run that does it."""
        found = load_manifest(self.source_set)
        transform: dict[str, Any] = found.transform
        return PreprocessConfig(
            source="shards", source_url=self.source_set, dest=self.dest, autoencoder=self.autoencoder, size=found.size,
            pixel_format=found.pixel_format, dtype=self.dtype or found.dtype, flips=self.flips,  # type: ignore[arg-type]
            lr_sizes=tuple(found.lr_sizes) if self.lr_sizes is None else self.lr_sizes,
            condition_resize=transform.get("condition_resize", "bicubic"),
            condition_cells=transform.get("condition_cells", "image"), batch_size=self.batch_size,
            samples_per_shard=self.samples_per_shard, device=self.device, workers=self.workers,
            gpus_per_worker=self.gpus_per_worker,
        )  # fmt: skip
