"""What parts work on, made here: pictures, shards, a bundle of untrained networks, an encoder that costs nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, save_bundle
from pipeline.config import AutoencoderConfig, ModelConfig
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess


def make_pictures(folder: Path, num: int, height: int, width: int) -> None:
    """JPEG pictures with the detail of photographs: smooth shapes and some noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(num):
        coarse = Image.fromarray(random.integers(0, 255, (8, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.normal(0, 6, smooth.shape).astype(np.int16)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)


def make_shards(folder: Path, model: ModelConfig) -> tuple[str, str]:
    """Shards of 16 pictures and the bundle that encoded them, below `folder`: their paths."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        small = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(small).resize((300, 300), Image.Resampling.BICUBIC).save(folder / f"pictures/{i}.png")
    torch.manual_seed(0)
    bundle = Bundle(model, build_autoencoder(model), build_decoder(model), build_denoiser(model))
    save_bundle(str(folder / "bundle"), bundle)
    config = PreprocessConfig(
        source="folder",
        source_url=str(folder / "pictures"),
        dest=str(folder / "data"),
        size=model.image_size,
        autoencoder=str(folder / "bundle"),
        samples_per_shard=8,
        batch_size=4,
    )
    preprocess(config)
    return str(folder / "data"), str(folder / "bundle")


class ConstantEncoder:
    """Costs nothing, so that what is measured is everything else."""

    def __init__(self, latent_channels: int, levels: int) -> None:
        self.config = AutoencoderConfig(latent_channels=latent_channels, width_mult=(1,) * levels)

    def identity(self) -> str:
        return "constant"

    def moments(self, image: Tensor) -> Tensor:
        factor = self.config.factor
        repeats = -(-self.config.latent_channels // 3)
        return image[:, :, ::factor, ::factor].repeat(1, repeats, 1, 1)[:, : self.config.latent_channels].contiguous()
