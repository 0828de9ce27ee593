"""Stage 0 with the implicit decoder: encoder and ND trained together by one loss, as the released code does for SR.

Legend: B batch, C latent channels, H/W pixels, h/w latent cells. There is no convolutional decoder, and no alignment
stage 1 afterwards: what comes out is a bundle of encoder and implicit decoder.
"""

from __future__ import annotations

import torch

from training.averaged import averaged_part
from training.config import AutoencoderStage, first_stage_unit
from training.context import Context
from training.engine import make_engine
from training.grids import Grids
from training.losses import kl_loss, per_sample, psnr
from training.reconstruction import joint_first_stage
from training.result import Trained
from training.session import Session
from training.stage_figures import joint_figures
from training.starts import start_autoencoder, start_decoder
from training.targets import draw_target
from training.watch import Watch


def train(context: Context) -> Trained:
    """min over E and ND of | ND(z; s) - resize(x, s) |, z ~ q(z|x), s drawn from the range of target sizes; with
    kl_weight > 0 (the released code has none) plus kl_weight · KL, in LDM's unit."""
    config, model = context.config, context.model
    assert isinstance(config, AutoencoderStage)
    torch.manual_seed(config.seed)
    network = joint_first_stage(model)
    start_autoencoder(network.autoencoder, config.start, context.bundle)
    start_decoder(network.decoder, config.decoder_start or config.start, context.bundle)
    engine = make_engine(network, config, context.world, deepspeed=context.request.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=True, latents=False))
    session.watch(Watch(context, engine, joint_figures(context)))
    grids = Grids(context)

    unit = first_stage_unit(model.autoencoder.kind, model.image_size)

    def draw_grid() -> None:
        weights = engine.averaged()  # collective
        grids.joint(session, *(averaged_part(context, name, weights) for name in ("autoencoder", "decoder")))

    if session.first_grid_due():
        draw_grid()
    for step, batch in session:
        # One target size a step, and a window of it.
        target = draw_target(config, model, step)
        for micro in session.micro_batches(batch):
            assert micro.pixels is not None
            shape = (model.autoencoder.latent_channels, model.latent_size, model.latent_size)
            noise = micro.draws(config.seed, "posterior", step).normal(shape)
            truth = target.truth(micro.pixels)  # (B,3,H,W)
            rendered, moments = engine(micro.pixels, noise, target.size, target.window)
            terms = {"l1": per_sample(rendered, truth, "l1").mean(), "kl": kl_loss(moments)}
            loss = terms["l1"] + config.kl_weight / unit * terms["kl"]
            session.backward(loss, {**terms, "psnr": psnr(rendered, truth)})
        session.end_step()
        if session.grid_due():
            draw_grid()

    return session.finish(engine.averaged())
