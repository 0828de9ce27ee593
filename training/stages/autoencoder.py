"""Stage 0: the autoencoder, for those who have no pre-trained one. L1 + KL or VQ, optionally LPIPS and a patch-GAN.

Legend: B batch, C latent channels, H/W pixels, h/w latent cells. Esser et al. (CVPR 2021), Rombach et al. (CVPR 2022).
"""

from __future__ import annotations

import torch

from pipeline.bundle import build_autoencoder
from pipeline.config import ModelConfig
from training.adversary import Adversary
from training.averaged import averaged_part
from training.config import AutoencoderStage, first_stage_unit
from training.context import Context
from training.engine import make_engine
from training.grids import Grids
from training.losses import adaptive_weight, kl_loss, per_sample, psnr
from training.optim import generator_for
from training.perceptual import load_perceptual
from training.reconstruction import Reconstruction
from training.result import Trained
from training.session import Session
from training.stage_figures import autoencoder_figures
from training.stages import joint
from training.starts import start_autoencoder
from training.watch import Watch


def train(context: Context) -> Trained:
    """min | x - D(E(x)) | + kl_weight · KL (or the codebook loss) [+ LPIPS] [+ patch-GAN], weighed as in LDM."""
    config, model = context.config, context.model
    assert isinstance(config, AutoencoderStage)
    if config.decoder == "implicit":
        return joint.train(context)
    torch.manual_seed(config.seed)
    autoencoder = build_autoencoder(model)
    start_autoencoder(autoencoder, config.start, context.bundle)
    network = Reconstruction(autoencoder)
    engine = make_engine(network, config, context.world, deepspeed=context.request.use_deepspeed)
    session = Session(context, engine, context.loader(pixels=True, latents=False))
    session.watch(Watch(context, engine, autoencoder_figures(context)))
    lpips = None
    if config.perceptual_weight:
        lpips = load_perceptual(config.lpips_weights, config.lpips_heads, context.world.device, config.precision)
    adversary = Adversary(config, context.world) if config.adversarial_weight else None
    if adversary is not None:
        session.attach("adversary", adversary)
    grids = Grids(context)

    if session.first_grid_due():
        grids.autoencoder(session, averaged_part(context, "autoencoder", engine.averaged()))
    for step, batch in session:
        window = _draw_crop(config, model, step)
        for micro in session.micro_batches(batch):
            assert micro.pixels is not None
            image = micro.pixels[:, :, window[0], window[1]]
            cells = tuple(side // model.autoencoder.factor for side in image.shape[-2:])
            noise = micro.draws(config.seed, "posterior", step).normal((model.autoencoder.latent_channels, *cells))
            made, regulariser, features = engine(image, noise)

            # LDM's loss divided by `unit`: there errors are sums over an image, here means.
            unit = first_stage_unit(model.autoencoder.kind, image.shape[-1])
            terms = {"l1": per_sample(made, image, "l1").mean()}
            reconstruction = terms["l1"]
            if lpips is not None:
                terms["lpips"] = lpips(made, image).mean()
                reconstruction = reconstruction + config.perceptual_weight * terms["lpips"]
            if model.autoencoder.kind == "kl":
                terms["kl"] = kl_loss(regulariser)
                loss = reconstruction + config.kl_weight / unit * terms["kl"]
            else:
                terms["codebook"] = regulariser
                loss = reconstruction + config.codebook_weight * terms["codebook"]
            if adversary is not None and step > config.adversarial_start:
                terms["generator"] = adversary.opinion(made)
                opinion = config.adversarial_weight * terms["generator"]
                if config.adversarial_balance == "adaptive":
                    terms["balance"] = adaptive_weight(reconstruction, terms["generator"], made, features, unit)
                    opinion = terms["balance"] * opinion
                loss = loss + opinion
            session.backward(loss, {**terms, "psnr": psnr(made, image)})
            if adversary is not None and step > config.adversarial_start:
                adversary.backward(image, made.detach(), session.accumulation)
        if adversary is not None and step > config.adversarial_start:
            adversary.step()
        session.end_step()
        if session.grid_due():
            grids.autoencoder(session, averaged_part(context, "autoencoder", engine.averaged()))

    return session.finish(engine.averaged())


def _draw_crop(config: AutoencoderStage, model: ModelConfig, step: int) -> tuple[slice, slice]:
    """Rows and columns of the training crop, the same on every worker."""
    side = min(config.crop or model.image_size, model.image_size)
    generator = generator_for(config.seed, "crop", step)
    y0, x0 = (int(torch.randint(0, model.image_size - side + 1, (), generator=generator)) for _ in range(2))
    return slice(y0, y0 + side), slice(x0, x0 + side)
