"""Alignment stage 1: the implicit decoder on latents of the frozen encoder (the paper's "0-th step" alignment).

Legend: B batch, C latent channels, H/W target pixels, h/w latent cells. Latents here are unscaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.autoencoder import latent_of
from pipeline.bundle import build_decoder
from pipeline.decoder import ImplicitDecoder
from pipeline.initialise import initialise_decoder
from training.config import DecoderStage
from training.context import Context, require_parts
from training.engine import make_engine
from training.grids import Grids
from training.losses import per_sample
from training.optim import normal
from training.session import Session
from training.stages.parts import Trained, psnr, trained
from training.targets import draw_target


def train(context: Context) -> Trained:
    """min over D_phi and f_theta of | ND(E(x); s) - resize(x, s) |, s drawn from the range of target sizes."""
    config, model = context.config, context.model
    assert isinstance(config, DecoderStage)
    require_parts(context.bundle, "decoder", "autoencoder")

    # The encoder is frozen, so its latents come from the cache and the encoder itself is not here.
    torch.manual_seed(config.seed)
    decoder = build_decoder(model)
    if config.start == "linear":
        initialise_decoder(decoder)
    engine = make_engine(decoder, config, context.world, deepspeed=context.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=True, latents=True))
    grids = Grids(context)
    noise_scale = config.latent_noise / model.scale_factor

    if session.first_grid_due():
        grids.reconstruction(session, trained_decoder(context, engine.averaged()))
    for step, batch in session:
        # One target size a step: s uniform in [min_size, max_size], and a window of it.
        target = draw_target(config, model, step)
        for micro in session.micro_batches(batch):
            assert micro.pixels is not None and micro.latents is not None
            latent = latent_of(micro.latents, model.autoencoder)  # (B,C,h,w)
            if noise_scale:
                keys = micro.generators(config.seed, "latent", step)
                latent = latent + noise_scale * normal(tuple(latent.shape[1:]), keys).to(latent)
            truth = target.cut(micro.pixels)  # (B,3,H,W)
            # ND = f_theta ∘ D_phi, eq. (6)
            rendered = engine(latent, target.size, target.window)
            loss = per_sample(rendered, truth, config.loss).mean()
            session.backward(loss, {"psnr": psnr(rendered, truth)})
        session.end_step()
        if session.grid_due():
            grids.reconstruction(session, trained_decoder(context, engine.averaged()))

    return trained(session, engine.averaged())


def trained_decoder(context: Context, weights: dict[str, Tensor] | None) -> ImplicitDecoder | None:
    """A decoder with the averaged weights, on the main worker."""
    if weights is None:
        return None
    decoder = build_decoder(context.model)
    decoder.load_state_dict(weights, strict=True)
    return decoder.to(context.world.device).eval()
