"""Denoising pre-training on cached latents, paper eq. (4).

Legend: B batch, C latent channels, h/w latent cells. z are scaled latents, t (B,) time steps.
"""

from __future__ import annotations

import torch

from pipeline.bundle import build_denoiser
from pipeline.diffusion import Schedule
from training.averaged import averaged_part
from training.config import DenoiserStage
from training.context import Context, require_parts
from training.engine import make_engine
from training.grids import Grids
from training.latents import draw_noise, scaled_latents, shown_condition
from training.losses import denoising_loss, min_snr_weight
from training.result import Trained
from training.session import Session
from training.stage_figures import denoiser_figures
from training.starts import start_denoiser
from training.watch import Watch


def train(context: Context) -> Trained:
    """min over eps_theta of | eps - eps_theta(z_t, t) |^2, eq. (4); SR models also see the condition latent."""
    config, model = context.config, context.model
    assert isinstance(config, DenoiserStage)
    bundle = require_parts(context.bundle, "denoiser")
    torch.manual_seed(config.seed)
    denoiser = build_denoiser(model)
    start_denoiser(denoiser, config.start, bundle)
    schedule = Schedule(model.schedule)
    engine = make_engine(denoiser, config, context.world, deepspeed=context.request.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=False, latents=True))
    session.watch(Watch(context, engine, denoiser_figures(context)))
    grids = Grids(context)

    if session.first_grid_due():
        grids.samples(session, averaged_part(context, "denoiser", engine.averaged()))
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
            grids.samples(session, averaged_part(context, "denoiser", engine.averaged()))

    return session.finish(engine.averaged())
