"""What the stages around the denoiser make of a micro-batch: scaled latents, the condition that is shown, noise.

Legend: B batch, C latent channels, h/w latent cells. z are scaled latents, t (B,) time steps.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.autoencoder import latent_of, posterior_sample
from pipeline.config import ModelConfig
from pipeline.diffusion import Schedule, noisy_condition
from training.micro_batch import MicroBatch


def scaled_latents(micro: MicroBatch, model: ModelConfig, seed: int | None, step: int) -> tuple[Tensor, Tensor | None]:
    """z0 (B,C,h,w) and the condition, scaled. With a seed, KL latents of both are drawn from their distribution."""

    def latent(stored: Tensor, key: str) -> Tensor:
        if seed is None or model.autoencoder.kind != "kl":
            return latent_of(stored, model.autoencoder) * model.scale_factor
        shape = (model.autoencoder.latent_channels, *stored.shape[2:])
        noise = micro.draws(seed, key, step).normal(shape).to(stored)
        return posterior_sample(stored, noise) * model.scale_factor

    assert micro.latents is not None
    z0 = latent(micro.latents, "posterior")
    if model.task != "sr":
        return z0, None
    assert micro.condition is not None
    return z0, latent(micro.condition, "condition posterior")


def shown_condition(
    micro: MicroBatch, condition: Tensor | None, model: ModelConfig, seed: int, step: int
) -> tuple[Tensor | None, Tensor | None]:
    """What the denoiser sees of a condition (B,C,h,w): itself, or noisy, with the drawn strengths (B,)."""
    most = model.denoiser.condition_noise
    if condition is None or not most:
        return condition, None
    draws = micro.draws(seed, "condition", step)
    strength = most * draws.uniform()
    noise = draws.normal(tuple(condition.shape[1:])).to(condition)
    return noisy_condition(condition, noise, strength), strength


def draw_noise(
    micro: MicroBatch, schedule: Schedule, shape: tuple[int, ...], seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """t (B,) uniform in 0..T-1 and eps (B,*shape), on the latents' device."""
    draws = micro.draws(seed, "diffusion", step)
    return draws.integers(schedule.config.num_steps), draws.normal(shape)
