"""Small models for direct super-resolution: D_phi without normalisation, random weights."""

from __future__ import annotations

import torch

from pipeline.bundle import Bundle, build_autoencoder, build_decoder
from pipeline.config import AutoencoderConfig, DecoderConfig, ModelConfig
from pipeline.decoder import ImplicitDecoder

IDENTITY = AutoencoderConfig(kind="identity", latent_channels=3, width_mult=(1,))


def norm_free(kind: str = "light") -> DecoderConfig:
    """D_phi of two widths and seven residual blocks."""
    return DecoderConfig(
        kind=kind,  # type: ignore[arg-type]
        norm="none",
        inputs="condition",
        base_width=6,
        width_mult=(1, 2),
        num_res_blocks=1,
        mid_attention=False,
        mlp_width=16,
        mlp_depth=2,
        light_width=16,
        light_depth=2,
    )


def lively(decoder: ImplicitDecoder) -> ImplicitDecoder:
    """Weights under which a cell feels the farthest cell that it can feel, and values stay near one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.8 * parameter[0].numel() ** -0.5, generator=generator)
    return decoder.eval().requires_grad_(False)


def direct_bundle(kind: str = "light", autoencoder: AutoencoderConfig = IDENTITY) -> Bundle:
    """Task "direct"; by default the latent is the low-resolution picture itself."""
    config = ModelConfig(
        name="small-direct", task="direct", image_size=32, autoencoder=autoencoder, decoder=norm_free(kind)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bundle = Bundle(config, build_autoencoder(config), lively(build_decoder(config)))
    bundle.autoencoder.eval().requires_grad_(False)
    return bundle
