"""Small real pictures and a small real autoencoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig
from preprocess.config import PreprocessConfig


def make_pictures(folder: Path, num: int, height: int = 40, width: int = 52) -> None:
    """`num` different photographs-like pictures: smooth gradients with a little noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 255, (5, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03d}.png")


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its content."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 11)
    return tmp_path / "pictures"


@pytest.fixture(scope="session")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(
        kind="kl", latent_channels=2, base_width=8, width_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4,
        mid_attention=False,
    )  # fmt: skip
    return Autoencoder(config).eval()


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> PreprocessConfig:
    return PreprocessConfig(
        source_url=str(pictures), dest=str(tmp_path / "out"), size=16, samples_per_shard=5, batch_size=2,
        encode_threads=1, decode_threads=2,
    )  # fmt: skip
