"""What the training tests train on: a shard set of small pictures and a bundle of untrained parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, save_bundle
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from preprocess.shards.manifest import load_manifest
from training.config import Preset, with_scale_factor

SCALE_RATIO = 1.25
"""Scale factor of the bundle over that of the data."""


@dataclass(frozen=True)
class Shop:
    """Everything a stage starts from. `pixels`: shards without latents."""

    data: str
    pixels: str
    bundle: str
    preset: Preset


def make_shop(root: Path, preset: Preset, num: int = 24, *, held_out: float = 0.0) -> Shop:
    """Pictures → shards → bundle of untrained parts. held_out: share of the pictures in the split `val`."""
    source = root / "pictures"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(num):
        small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC).save(source / f"{i:03d}.png")
    torch.manual_seed(0)
    autoencoder = build_autoencoder(preset.model)
    first = str(root / "first")
    save_bundle(first, Bundle(preset.model, autoencoder))
    common = {"source": "folder", "source_url": str(source), "size": preset.model.image_size, "samples_per_shard": 8}
    common["val_fraction"] = held_out
    pixels, data = str(root / "pixels"), str(root / "data")
    preprocess(PreprocessConfig(dest=pixels, **common))
    sizes = (preset.model.lr_size,) if preset.model.lr_size else ()
    enlarged = preset.model.condition_resize
    preprocess(
        PreprocessConfig(
            dest=data, autoencoder=first, lr_sizes=sizes, condition_resize=enlarged, encode_threads=1, **common
        )
    )
    # Another scale than the data's own: a denoiser that comes from elsewhere was trained with that of other data.
    model = with_scale_factor(preset.model, SCALE_RATIO * load_manifest(data).scale_factor)
    bundle = str(root / "bundle")
    save_bundle(bundle, Bundle(model, autoencoder, build_decoder(model), build_denoiser(model)))
    return Shop(data, pixels, bundle, preset)
