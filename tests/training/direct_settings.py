"""Settings that make the `debug` preset one for direct super-resolution, and data with cached conditions for it."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.bundle import Bundle, build_autoencoder, save_bundle
from pipeline.config import ModelConfig
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess

WITH_ENCODER = [
    "model.task=direct",
    "model.decoder.kind=light",
    "model.decoder.norm=none",
    "model.decoder.inputs=condition",
    "model.decoder.width_mult=[1]",
    "model.decoder.light_width=24",
    "model.decoder.light_depth=2",
    "decoder.input_cells=12",
    "decoder.crop=14",
    "decoder.turns=true",
]
"""With the preset's KL autoencoder (f = 4)."""
DIRECT = ["model.autoencoder.kind=identity", "model.autoencoder.width_mult=[1]", *WITH_ENCODER]
"""The latent is the low-resolution picture itself."""


def save_first_stage(url: str, model: ModelConfig) -> str:
    """A bundle of the untrained autoencoder alone."""
    torch.manual_seed(0)
    save_bundle(url, Bundle(model, build_autoencoder(model)))
    return url


def with_conditions(pictures: Path, dest: Path, first_stage: str, *lr_sizes: int, cells: str = "input") -> str:
    """Shards of 32-pixel pictures with condition latents."""
    preprocess(
        PreprocessConfig(
            source_url=str(pictures), dest=str(dest), size=32, samples_per_shard=8, autoencoder=first_stage,
            lr_sizes=lr_sizes, condition_cells=cells, encode_threads=1,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    return str(dest)
