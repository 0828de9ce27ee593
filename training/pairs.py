"""What alignment stage 1 shows the implicit decoder: a latent, and the pixels that it should render from it.

Legend: B batch, C latent channels, H/W compared pixels, h/w latent cells, c low-resolution pixels.
Latents are unscaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.autoencoder import Autoencoder, latent_of, posterior_sample
from pipeline.config import ModelConfig
from training.config import DecoderStage
from training.micro_batch import MicroBatch
from training.targets import draw_target
from training.zoom import condition_image, draw_zoom


@dataclass(frozen=True)
class Pair:
    """latent (B,C,h,w) → truth (B,3,H,W); `where` are the decoder's further arguments: size, window, lattice."""

    latent: Tensor
    where: tuple[Any, ...]
    truth: Tensor


MakePair = Callable[[MicroBatch], Pair]
"""A micro-batch of the step's samples → its pair."""


def latent_pairs(config: DecoderStage, model: ModelConfig, step: int) -> MakePair:
    """The samples' own latents, and the samples at a drawn target size. A decoder for both kinds of input is shown the
    super-resolution conditions at every second step."""
    shows_condition = model.decoder.inputs == "both" and step % 2 == 0
    target = draw_target(config, model, step)
    noise_scale = config.latent_noise / model.scale_factor

    def make(micro: MicroBatch) -> Pair:
        stored = micro.condition if shows_condition else micro.latents
        assert micro.pixels is not None and stored is not None
        latent = _latent(micro, stored, config, model, step)
        if noise_scale:
            noise = micro.draws(config.seed, "latent", step).normal(tuple(latent.shape[1:]))
            latent = latent + noise_scale * noise.to(latent)
        return Pair(latent, (target.size, target.window), target.truth(micro.pixels))

    return make


def cached_pairs(config: DecoderStage, model: ModelConfig, step: int) -> MakePair:
    """Direct super-resolution from cached conditions: their latents, and the samples at a drawn target size, from the
    input's own size on."""

    def make(micro: MicroBatch) -> Pair:
        assert micro.pixels is not None and micro.condition is not None
        latent = _latent(micro, micro.condition, config, model, step)
        target = draw_target(config, model, step, smallest=latent.shape[-1])
        return Pair(latent, (target.size, target.window), target.truth(micro.pixels))

    return make


def _latent(micro: MicroBatch, stored: Tensor, config: DecoderStage, model: ModelConfig, step: int) -> Tensor:
    """Stored latents (B,S,h,w) → (B,C,h,w): the mean of KL latents, or with `sample_latents` a sample."""
    if not config.sample_latents or model.autoencoder.kind != "kl":
        return latent_of(stored, model.autoencoder)
    shape = (model.autoencoder.latent_channels, *stored.shape[2:])
    return posterior_sample(stored, micro.draws(config.seed, "posterior", step).normal(shape).to(stored))


def direct_pairs(config: DecoderStage, model: ModelConfig, autoencoder: Autoencoder, step: int) -> MakePair:
    """Direct super-resolution: a drawn region of the samples, reduced by a drawn scale, enlarged by f and encoded; the
    truth is the region itself."""
    zoom = draw_zoom(config, model.image_size, step)

    @torch.no_grad()
    def make(micro: MicroBatch) -> Pair:
        assert micro.pixels is not None
        region = zoom.region(micro.pixels)
        low = zoom.low_resolution(region)  # (B,3,c,c)
        latent = autoencoder.encode(condition_image(low, model.autoencoder.factor, model.condition_resize))
        return Pair(latent, (zoom.size, None, (zoom.rows, zoom.cols)), zoom.truth(region))

    return make
