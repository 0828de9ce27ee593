"""Small models with random weights, and how closeness is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig
from pipeline.model import LatentZoom


@dataclass(frozen=True)
class Released:
    """What the released implementation computed, and our model with its weights."""

    vectors: dict[str, Tensor]
    weights: dict[str, Tensor]
    config: str
    ema: LatentZoom
    raw: LatentZoom


def small_config(task: str = "generation", decoder: str = "liif") -> ModelConfig:
    """A model of about 60 thousand parameters, f = 4."""
    return ModelConfig(
        name="small",
        task=task,  # type: ignore[arg-type]
        image_size=32,
        lr_size=8 if task == "sr" else 0,
        scale_factor=1.5,
        autoencoder=AutoencoderConfig(
            kind="kl", base_width=8, width_mult=(1, 1, 2), num_res_blocks=1, norm_groups=4, latent_channels=3
        ),
        decoder=DecoderConfig(
            kind=decoder,  # type: ignore[arg-type]
            base_width=8,
            width_mult=(1, 2),
            num_res_blocks=1,
            norm_groups=4,
            mlp_width=24,
            mlp_depth=4,
            light_width=24,
            light_depth=3,
        ),
        denoiser=DenoiserConfig(
            base_width=16, width_mult=(1, 2), num_res_blocks=1, attention_factors=(2,), head_channels=8, norm_groups=4
        ),
    )


def small_bundle(task: str = "generation", decoder: str = "liif", seed: int = 0) -> Bundle:
    """Random weights from `seed`, in evaluation mode and without gradient."""
    config = small_config(task, decoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bundle = Bundle(config, build_autoencoder(config), build_decoder(config), build_denoiser(config))
    for part in (bundle.autoencoder, bundle.decoder, bundle.denoiser):
        assert part is not None
        part.eval().requires_grad_(False)
    return bundle


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, Euclidean norms."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
