"""Alignment stage 1: the implicit decoder on latents of the frozen encoder (the paper's "0-th step" alignment).

Legend: B batch, C latent channels, H/W target pixels, h/w latent cells. Latents here are unscaled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipeline.bundle import build_decoder
from pipeline.decoder import ImplicitDecoder
from training.averaged import averaged_part
from training.config import DecoderStage, with_scale_factor
from training.context import Context, frozen_autoencoder
from training.engine import make_engine
from training.grids import Grids
from training.losses import per_sample, psnr
from training.pairs import MakePair, cached_pairs, direct_pairs, latent_pairs
from training.perceptual import load_perceptual
from training.result import Trained
from training.session import Session
from training.stage_figures import decoder_figures
from training.starts import start_decoder
from training.watch import Watch


def train(context: Context) -> Trained:
    """min over D_phi and f_theta of | ND(E(x); s) - resize(x, s) |, s drawn from the range of target sizes.

    For direct super-resolution the input is the encoded low-resolution image, and s a drawn enlargement of it.
    """
    config, model = context.config, context.model
    assert isinstance(config, DecoderStage)
    is_direct = model.task == "direct"
    is_drawn = is_direct and config.conditions == "drawn"

    # The encoder is frozen: its latents come from the cache, or it encodes the conditions that a step draws.
    torch.manual_seed(config.seed)
    decoder = starting_decoder(context)
    engine = make_engine(decoder, config, context.world, deepspeed=context.request.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=True, latents=not is_drawn))
    session.watch(Watch(context, engine, decoder_figures(context)))
    encoder = frozen_autoencoder(context).to(context.world.device) if is_drawn else None
    # The unit of latent_noise is the deviation of these latents, whatever scale the bundle's denoiser was trained with.
    measured = with_scale_factor(model, context.manifest.scale_factor)
    make_pairs: Callable[[int], MakePair] = partial(latent_pairs, config, measured)
    if is_direct:
        make_pairs = partial(direct_pairs, config, model, encoder) if encoder else partial(cached_pairs, config, model)
    lpips = None
    if config.perceptual_weight:
        lpips = load_perceptual(config.lpips_weights, config.lpips_heads, context.world.device, config.precision)
    grids = Grids(context)
    draw_grid = grids.enlargement if is_direct else grids.reconstruction

    if session.first_grid_due():
        draw_grid(session, averaged_part(context, "decoder", engine.averaged()))
    for step, batch in session:
        # One target size a step: s uniform in [min_size, max_size], and a window of it; or one scale and region.
        pair_of = make_pairs(step)
        for micro in session.micro_batches(batch):
            pair = pair_of(micro)
            # ND = f_theta ∘ D_phi, eq. (6)
            rendered = engine(pair.latent, *pair.where)  # (B,3,H,W)
            loss = per_sample(rendered, pair.truth, config.loss).mean()
            terms = {"psnr": psnr(rendered, pair.truth)}
            if lpips is not None:
                terms |= {config.loss: loss, "lpips": lpips(rendered, pair.truth).mean()}
                loss = loss + config.perceptual_weight * terms["lpips"]
            session.backward(loss, terms)
        session.end_step()
        if session.grid_due():
            draw_grid(session, averaged_part(context, "decoder", engine.averaged()))

    return session.finish(engine.averaged())


def starting_decoder(context: Context) -> ImplicitDecoder:
    """The decoder that training begins with, as the stage's `start` says."""
    config = context.config
    assert isinstance(config, DecoderStage)
    decoder = build_decoder(context.model)
    start_decoder(decoder, config.start, context.bundle)
    return decoder
