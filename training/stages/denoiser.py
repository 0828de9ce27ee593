"""Denoising pre-training on cached latents, paper eq. (4).

Legend: B batch, C latent channels, h/w latent cells. z are scaled latents, t (B,) time steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.autoencoder import latent_of
from pipeline.bundle import build_denoiser
from pipeline.config import ModelConfig
from pipeline.denoiser import Denoiser
from pipeline.diffusion import Schedule
from training.config import DenoiserStage
from training.context import Context, require_parts
from training.engine import make_engine
from training.grids import Grids
from training.losses import denoising_loss
from training.optim import normal
from training.session import MicroBatch, Session
from training.stages.parts import Trained, trained


def train(context: Context) -> Trained:
    """min over eps_theta of | eps - eps_theta(z_t, t) |^2, eq. (4); SR models also see the condition latent."""
    config, model = context.config, context.model
    assert isinstance(config, DenoiserStage)
    bundle = require_parts(context.bundle, "denoiser", "autoencoder")
    torch.manual_seed(config.seed)
    denoiser = build_denoiser(model)
    if config.start != "random":
        assert bundle.denoiser is not None
        denoiser.load_state_dict(bundle.denoiser.state_dict(), strict=True)
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
            prediction = engine(z_t, t, condition)
            loss = denoising_loss(prediction, schedule.target(z0, eps, t))
            session.backward(loss, {})
        session.end_step()
        if session.grid_due():
            grids.samples(session, trained_denoiser(context, engine.averaged()))

    return trained(session, engine.averaged())


def scaled_latents(micro: MicroBatch, model: ModelConfig, seed: int | None, step: int) -> tuple[Tensor, Tensor | None]:
    """z0 (B,C,h,w) and the condition, scaled. With a seed, KL latents are drawn from their distribution."""
    assert micro.latents is not None
    latent = latent_of(micro.latents, model.autoencoder)
    if seed is not None and model.autoencoder.kind == "kl":
        log_variance = micro.latents.chunk(2, dim=1)[1].clamp(-30.0, 20.0)
        noise = normal(tuple(latent.shape[1:]), micro.generators(seed, "posterior", step)).to(latent)
        latent = latent + torch.exp(0.5 * log_variance) * noise
    condition = None
    if model.task == "sr":
        assert micro.condition is not None
        condition = latent_of(micro.condition, model.autoencoder) * model.scale_factor
    return latent * model.scale_factor, condition


def draw_noise(
    micro: MicroBatch, schedule: Schedule, shape: tuple[int, ...], seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """t (B,) uniform in 0..T-1 on the latents' device and eps (B,*shape) on the CPU, a generator a sample."""
    assert micro.latents is not None
    keys = micro.generators(seed, "diffusion", step)
    t = torch.stack([torch.randint(0, schedule.config.num_steps, (), generator=key) for key in keys])
    return t.to(micro.latents.device), normal(shape, keys)


def trained_denoiser(context: Context, weights: dict[str, Tensor] | None) -> Denoiser | None:
    """A denoiser with the averaged weights, on the main worker."""
    if weights is None:
        return None
    denoiser = build_denoiser(context.model)
    denoiser.load_state_dict(weights, strict=True)
    return denoiser.to(context.world.device).eval()
