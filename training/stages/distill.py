"""One-step super-resolution: a student learns to make in one evaluation what its teacher makes in many.

Trajectory distillation. A deterministic solver takes each noise z_T, under each condition, to one latent z_0; the
student learns this map itself from pairs (z_T, z_0) (Luhman & Luhman, "Knowledge Distillation in Iterative Generative
Models for Improved Sampling Speed", 2021). Wang et al., "SinSR" (CVPR 2024), do so for super-resolution, with a term on
the truth; here the rendering through the frozen implicit decoder is compared too, as alignment stage 2 does.

Legend: B batch, C latent channels, H/W target pixels, h/w latent cells. z are scaled latents, t (B,) time steps.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pipeline.bundle import build_denoiser
from pipeline.denoiser import Denoiser
from pipeline.diffusion import Schedule
from pipeline.sampling import dpm_solver
from training.averaged import averaged_part
from training.config import DistillStage
from training.context import Context, require_parts
from training.engine import make_engine
from training.grids import Grids
from training.latents import scaled_latents, shown_condition
from training.losses import per_sample, psnr
from training.precision import autocast, frozen_precision
from training.result import Trained
from training.session import Session
from training.stage_figures import distill_figures
from training.starts import start_denoiser
from training.targets import draw_target, render_target
from training.watch import Watch


def train(context: Context) -> Trained:
    """min over the student of lambda_latent · |z0_pred - z_0| + lambda_image · |ND(z0_pred; s) - ND(z_0; s)|
    + lambda_truth · |ND(z0_pred; s) - x|, with z0_pred of one evaluation at z_T, and z_0 the teacher's."""
    config, model, device = context.config, context.model, context.world.device
    assert isinstance(config, DistillStage)
    bundle = require_parts(context.bundle, "distill")
    assert bundle.decoder is not None and bundle.denoiser is not None

    # Teacher and ND are frozen and stay outside the engine; gradients run through ND, as in alignment stage 2.
    decoder = copy.deepcopy(bundle.decoder).to(device).train().requires_grad_(False)
    teacher = copy.deepcopy(bundle.denoiser).to(device).eval().requires_grad_(False)
    schedule, path = Schedule(model.schedule), Schedule(bundle.config.schedule)
    student = starting_student(context)
    engine = make_engine(student, config, context.world, deepspeed=context.request.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=True, latents=True))
    session.watch(Watch(context, engine, distill_figures(context)))
    grids = Grids(context)

    @torch.no_grad()
    def teach(noise: Tensor, *shown: Tensor | None) -> Tensor:
        """z_T (B,C,h,w) → z_0, the other end of the teacher's trajectory; the solver's own steps are float32."""

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            with autocast(config, device):
                return teacher(z_t, t, *shown).float()

        return dpm_solver(predict, path, noise, num_steps=config.teacher_steps)

    if session.first_grid_due():
        grids.distilled(session, averaged_part(context, "denoiser", engine.averaged()), decoder, teacher)
    for step, batch in session:
        target = draw_target(config, model, step)
        for micro in session.micro_batches(batch):
            assert micro.pixels is not None
            z, condition = scaled_latents(micro, model, None, step)
            noise = micro.draws(config.seed, "trajectory", step).normal(tuple(z.shape[1:])).to(z)
            shown = shown_condition(micro, condition, model, config.seed, step)
            z_0 = teach(noise, *shown)
            t = torch.full((len(noise),), model.schedule.num_steps - 1, dtype=torch.int64, device=device)
            z0_pred = schedule.to_x0(noise, engine(noise, t, *shown), t)
            with frozen_precision(config, device):
                rendered = render_target(decoder, z0_pred / model.scale_factor, target, config.context_cells).float()
                with torch.no_grad():
                    taught = render_target(decoder, z_0 / model.scale_factor, target, config.context_cells).float()
            truth = target.truth(micro.pixels)
            terms = {
                "loss_latent": per_sample(z0_pred, z_0, config.loss).mean(),
                "loss_image": per_sample(rendered, taught, config.loss).mean(),
                "loss_truth": per_sample(rendered, truth, config.loss).mean(),
            }
            weights = (config.lambda_latent, config.lambda_image, config.lambda_truth)
            loss = sum((w * term for w, term in zip(weights, terms.values())), torch.zeros((), device=device))
            figures = {"psnr": psnr(rendered, truth), "teacher_psnr": psnr(taught, truth)}
            session.backward(loss, {**terms, **figures})
        session.end_step()
        if session.grid_due():
            grids.distilled(session, averaged_part(context, "denoiser", engine.averaged()), decoder, teacher)

    return session.finish(engine.averaged())


def starting_student(context: Context) -> Denoiser:
    """The teacher's weights. Where the teacher predicts eps and the student the latent, the output layer begins at
    zero, as it does in a new network: from there the first guess is the mean latent, and not the noise."""
    assert context.bundle is not None and context.bundle.denoiser is not None
    student = build_denoiser(context.model)
    start_denoiser(student, "bundle", context.bundle)
    if context.model.schedule.prediction != context.bundle.config.schedule.prediction:
        for parameter in student.unet.conv_out.parameters():
            torch.nn.init.zeros_(parameter)
    return student
