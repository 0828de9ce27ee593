"""Alignment stage 2: the denoiser through the frozen implicit decoder (the paper's "any t-th step" alignment).

Legend: B batch, C latent channels, H/W target pixels, h/w latent cells. z are scaled latents, t (B,) time steps.
No encoder runs here: latents, their flips and SR conditions come from the cache.
"""

from __future__ import annotations

import copy

from pipeline.bundle import build_denoiser
from pipeline.diffusion import Schedule
from training.averaged import averaged_part
from training.config import AlignStage
from training.context import Context, require_parts
from training.engine import make_engine
from training.grids import Grids
from training.latents import draw_noise, scaled_latents, shown_condition
from training.losses import alignment_loss, diffusion_weight
from training.precision import frozen_precision
from training.result import Trained
from training.session import Session
from training.stage_figures import align_figures
from training.targets import draw_target, render_target
from training.watch import Watch


def train(context: Context) -> Trained:
    """min over eps_theta of lambda_dm · L_dm + lambda_recon · L_recon, eq. (9), with E and ND frozen."""
    config, model = context.config, context.model
    assert isinstance(config, AlignStage)
    bundle = require_parts(context.bundle, "align")
    assert bundle.decoder is not None and bundle.denoiser is not None

    # ND is frozen and stays outside the engine: gradients run through it, none are kept for it. It has no dropout or
    # batch statistics, so training mode changes nothing but its check for NaN, which is the session's to report.
    decoder = copy.deepcopy(bundle.decoder).to(context.world.device).train().requires_grad_(False)
    denoiser = build_denoiser(model)
    denoiser.load_state_dict(bundle.denoiser.state_dict(), strict=True)
    schedule = Schedule(model.schedule)
    engine = make_engine(denoiser, config, context.world, deepspeed=context.request.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=True, latents=True))
    session.watch(Watch(context, engine, align_figures(context)))
    grids = Grids(context)

    if session.first_grid_due():
        grids.samples(session, averaged_part(context, "denoiser", engine.averaged()), decoder)
    for step, batch in session:
        target = draw_target(config, model, step)
        for micro in session.micro_batches(batch):
            assert micro.pixels is not None
            z0, condition = scaled_latents(micro, model, config.seed if config.sample_latents else None, step)
            t, eps = draw_noise(micro, schedule, tuple(z0.shape[1:]), config.seed, step)
            # z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps, eq. (1); then the clean latent the prediction implies
            z_t = schedule.add_noise(z0, eps.to(z0), t)
            prediction = engine(z_t, t, *shown_condition(micro, condition, model, config.seed, step))
            z0_pred = schedule.to_x0(z_t, prediction, t)
            # ND(z0_pred; s) with gradient through it, eq. (6)
            with frozen_precision(config, context.world.device):
                rendered = render_target(decoder, z0_pred / model.scale_factor, target, config.context_cells).float()
            truth = target.truth(micro.pixels)
            # eqs. (7)-(9), weighted sample by sample
            weight = diffusion_weight(schedule.snr(t), config.loss, config.weight_clip)
            loss, dm, recon = alignment_loss(
                (z0_pred, z0), (rendered, truth), weight, config.loss, config.lambda_dm, config.lambda_recon
            )
            session.backward(loss, {"loss_dm": dm, "loss_recon": recon})
        session.end_step()
        if session.grid_due():
            grids.samples(session, averaged_part(context, "denoiser", engine.averaged()), decoder)

    return session.finish(engine.averaged())
