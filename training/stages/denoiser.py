"""Denoising pre-training on cached latents, paper eq. (4).

Legend: B batch, C latent channels, h/w latent cells. z are scaled latents, t (B,) time steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.autoencoder import latent_of, posterior_sample
from pipeline.bundle import build_denoiser
from pipeline.config import ModelConfig
from pipeline.denoiser import Denoiser
from pipeline.diffusion import Schedule, noisy_condition
from training.config import DenoiserStage
from training.context import Context, require_parts
from training.engine import make_engine
from training.grids import Grids
from training.losses import denoising_loss, min_snr_weight
from training.session import MicroBatch, Session
from training.stages.parts import Trained, trained
from training.starts import start_denoiser


def train(context: Context) -> Trained:
    """min over eps_theta of | eps - eps_theta(z_t, t) |^2, eq. (4); SR models also see the condition latent."""
    config, model = context.config, context.model
    assert isinstance(config, DenoiserStage)
    bundle = require_parts(context.bundle, "denoiser", "autoencoder")
    torch.manual_seed(config.seed)
    denoiser = build_denoiser(model)
    start_denoiser(denoiser, config.start, bundle)
    schedule = Schedule(model.schedule)
    engine = make_engine(denoiser, config, context.world, deepspeed=context.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=False, latents=True))
    grids = Grids(context)

    if session.first_grid_due():
        grids.samples(session, trained_denoiser(context, engine.averaged()))
    for step, batch in session:
        for micro in session.micro_batches(batch):
            z0, condition = scaled_latents(micro, model, config.seed if config.sample_latents else None, step)
            t, eps = draw_noise(micro, schedule, tuple(z0.shape[1:]), config.seed, step)
            eps = eps.to(z0)
            # z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps, eq. (1)
            z_t = schedule.add_noise(z0, eps, t)
            prediction = engine(z_t, t, *shown_condition(micro, condition, model, config.seed, step))
            weight = None
            if config.min_snr_gamma:
                weight = min_snr_weight(schedule.snr(t), model.schedule.prediction, config.min_snr_gamma, config.loss)
            loss = denoising_loss(prediction, schedule.target(z0, eps, t), config.loss, weight)
            session.backward(loss, {})
        session.end_step()
        if session.grid_due():
            grids.samples(session, trained_denoiser(context, engine.averaged()))

    return trained(session, engine.averaged())


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


def trained_denoiser(context: Context, weights: dict[str, Tensor] | None) -> Denoiser | None:
    """A denoiser with the averaged weights, on the main worker."""
    if weights is None:
        return None
    denoiser = build_denoiser(context.model)
    denoiser.load_state_dict(weights, strict=True)
    return denoiser.to(context.world.device).eval()
