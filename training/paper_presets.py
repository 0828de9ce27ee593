"""The paper's models (Kim & Kim, CVPR 2024), as its released configuration files have them.

First stages and denoisers that the paper took from latent diffusion (Rombach et al., CVPR 2022) are those of LDM's own
files. Widths, levels, attention, schedules, target sizes, losses and learning rates are the files' and the paper's;
batch sizes and steps are for eight GPUs and yours to change. tests/training/test_presets.py holds the whole table.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig, ScheduleConfig
from training.config import AlignStage, AutoencoderStage, DecoderStage, DenoiserStage, DistillStage, Preset

# LDM: models/first_stage_models/vq-f4 (the one without attention) and kl-f8.
_VQ_F4 = AutoencoderConfig(kind="vq", latent_channels=3, base_width=128, width_mult=(1, 2, 4), num_embeddings=8192)
_KL_F8 = AutoencoderConfig(kind="kl", latent_channels=4, base_width=128, width_mult=(1, 2, 4, 4))
# The paper's own first stages for super-resolution have 32 channels. The faces' file asks for attention where 16 pixels
# are left, level 3 of 128 pixels; there is no such level, so the entry has no effect.
_KL_F4_FACES = AutoencoderConfig(
    kind="kl", latent_channels=32, base_width=128, width_mult=(1, 2, 4), attention_levels=(3,)
)
_KL_F8_TOWER = AutoencoderConfig(kind="kl", latent_channels=32, base_width=128, width_mult=(1, 2, 4, 4))

_DECODER_F4 = DecoderConfig(base_width=128, width_mult=(1, 2, 4), num_res_blocks=2)
_DECODER_F8 = DecoderConfig(base_width=128, width_mult=(1, 2, 4, 4), num_res_blocks=2)

# LDM: ffhq-ldm-vq-4 and lsun_bedrooms-ldm-vq-4, lsun_churches-ldm-kl-8, bsr_sr.
_LDM_F4 = DenoiserConfig(base_width=224, width_mult=(1, 2, 3, 4), attention_factors=(2, 4, 8), head_channels=32)
_LDM_CHURCHES = DenoiserConfig(
    base_width=192,
    width_mult=(1, 2, 2, 4, 4),
    attention_factors=(1, 2, 4, 8),
    num_heads=8,
    scale_shift=True,
    resample="resnet",
)
_LDM_BSR = DenoiserConfig(base_width=160, width_mult=(1, 2, 2, 4), attention_factors=(8, 16), head_channels=32)
_PAPER_SR = DenoiserConfig(base_width=256, width_mult=(1, 2, 4, 4), attention_factors=(1, 2, 4), head_channels=32)

_MAX_ASPECT = 1.5
"""Of targets. The released code draws squares only, from which the head never learns other pixels."""

_LDM_NOISE = ScheduleConfig(beta_start=0.0015, beta_end=0.0195)
_WEAKER_NOISE = ScheduleConfig(beta_start=0.0015, beta_end=0.0155)
_PAPER_SR_NOISE = ScheduleConfig(beta_start=1e-4, beta_end=0.015)


def ffhq_256() -> Preset:
    """Generation of faces, 256 pixels, over LDM's VQ f = 4; targets of 64 to 256 pixels."""
    model = ModelConfig(
        name="ffhq-256",
        image_size=256,
        autoencoder=_VQ_F4,
        decoder=_DECODER_F4,
        denoiser=_LDM_F4,
        schedule=_LDM_NOISE,
    )
    return _paper(model, denoiser_lr=8.4e-5)


def lsun_bedroom_256() -> Preset:
    """Generation of bedrooms, 256 pixels, over LDM's VQ f = 4; targets of 64 to 256 pixels."""
    model = ModelConfig(
        name="lsun-bedroom-256",
        image_size=256,
        autoencoder=_VQ_F4,
        decoder=_DECODER_F4,
        denoiser=_LDM_F4,
        schedule=_LDM_NOISE,
    )
    return _paper(model, denoiser_lr=9.6e-5)


def lsun_church_256() -> Preset:
    """Generation of churches, 256 pixels, over LDM's KL f = 8, with absolute errors; targets of 32 to 256 pixels."""
    model = ModelConfig(
        name="lsun-church-256",
        image_size=256,
        autoencoder=_KL_F8,
        decoder=_DECODER_F8,
        denoiser=_LDM_CHURCHES,
        schedule=_WEAKER_NOISE,
    )
    return _paper(model, denoiser_lr=5e-5, warmup_steps=10_000, loss="l1")


def celebahq_sr_16_128() -> Preset:
    """Super-resolution of faces from 16 pixels, trained at 128: KL f = 4 with 32 channels, encoder and implicit decoder
    trained together; targets of 32 to 128 pixels."""
    model = ModelConfig(
        name="celebahq-sr-16-128",
        task="sr",
        image_size=128,
        lr_size=16,
        condition_resize="nearest",
        autoencoder=_KL_F4_FACES,
        decoder=_DECODER_F4,
        denoiser=_PAPER_SR,
        schedule=_PAPER_SR_NOISE,
    )
    return _joint(_paper(model, denoiser_lr=1e-4))


def lsun_tower_sr_256() -> Preset:
    """Super-resolution of towers from 16 pixels (16×), trained at 256: KL f = 8 with 32 channels, encoder and implicit
    decoder trained together; targets of 32 to 256 pixels. No file of its denoiser was published: the faces' is used,
    whose latents have the same size."""
    model = ModelConfig(
        name="lsun-tower-sr-256",
        task="sr",
        image_size=256,
        lr_size=16,
        condition_resize="nearest",
        autoencoder=_KL_F8_TOWER,
        decoder=_DECODER_F8,
        denoiser=_PAPER_SR,
        schedule=_PAPER_SR_NOISE,
    )
    return _joint(_paper(model, denoiser_lr=1e-4))


def div2k_sr() -> Preset:
    """Super-resolution of photographs over LDM's VQ f = 4, 48 to 192 pixels (4×); targets of 48 to 192 pixels. The
    paper's denoiser started from LDM's `bsr_sr`, which this one has the shape of."""
    return _paper(_photographs("div2k-sr", _LDM_BSR), denoiser_lr=1e-4)


def df2k_sr() -> Preset:
    """`div2k-sr` for DIV2K and Flickr2K together. Its file asks for attention at the factors 6 and 12, which no level
    has: only the middle block attends."""
    denoiser = dataclasses.replace(_LDM_BSR, attention_factors=(6, 12))
    return _paper(_photographs("df2k-sr", denoiser), denoiser_lr=1e-4)


def _photographs(name: str, denoiser: DenoiserConfig) -> ModelConfig:
    return ModelConfig(
        name=name,
        task="sr",
        image_size=192,
        lr_size=48,
        condition_resize="nearest",
        autoencoder=_VQ_F4,
        decoder=_DECODER_F4,
        denoiser=denoiser,
        schedule=_WEAKER_NOISE,
    )


def _paper(
    model: ModelConfig, *, denoiser_lr: float, warmup_steps: int = 0, loss: Literal["l1", "l2"] = "l2"
) -> Preset:
    """The paper's training: Adam; 5e-5 for the decoder, 1e-6 for the alignment, EMA 0.9999, KL latents drawn from their
    distribution; here in bf16 under ZeRO 1. loss: of the denoiser and of alignment stage 2.

    Targets have the paper's range of sizes, and height and width of their own (`max_aspect`), since models are asked
    for pictures that are not square; the paper's are squares, which max_aspect=1 gives.

    Alignment stage 2 renders a window of 12 × 12 latent cells of each target, and D_phi sees 4 cells around it: the
    work is the same for every target size, little more than the denoiser's. docs/verbs/train.md has the figures.
    Distillation to one step, which the paper does not have, is this project's and off unless asked for (`one_step`).
    """
    common: dict[str, Any] = {
        "precision": "bf16",
        "zero_stage": 1,
        "clip_norm": 1.0,
        "checkpoint_every": 2000,
        "grid_every": 2000,
        "validate_every": 2000,
        "bundle_every": 2000,
        "log_every": 50,
    }
    judged = {**common, "quality_every": 10_000}
    low, high = model.latent_size, model.image_size
    is_drawn = model.autoencoder.kind == "kl"
    return Preset(
        name=model.name,
        model=model,
        autoencoder=AutoencoderStage(steps=200_000, global_batch=32, lr=3.6e-5, ema_decay=0.9999, **common),
        decoder=DecoderStage(
            steps=200_000,
            global_batch=32,
            lr=5e-5,
            min_size=low,
            max_size=high,
            max_aspect=_MAX_ASPECT,
            crop=128,
            sample_latents=is_drawn,
            **common,
        ),
        denoiser=DenoiserStage(
            steps=500_000,
            global_batch=96,
            lr=denoiser_lr,
            ema_decay=0.9999,
            warmup_steps=warmup_steps,
            loss=loss,
            sample_latents=is_drawn,
            **judged,
        ),
        align=AlignStage(
            steps=50_000,
            global_batch=32,
            lr=1e-6,
            loss=loss,
            min_size=low,
            max_size=high,
            max_aspect=_MAX_ASPECT,
            crop_cells=12,
            context_cells=4,
            sample_latents=is_drawn,
            **judged,
        ),
        distill=DistillStage(
            steps=30_000,
            global_batch=32,
            lr=5e-5,
            warmup_steps=1_000,
            min_size=low,
            max_size=high,
            max_aspect=_MAX_ASPECT,
            crop_cells=12,
            context_cells=4,
            **judged,
        ),
    )


def _joint(preset: Preset) -> Preset:
    """Encoder and implicit decoder trained together by plain L1 at drawn target sizes: no KL term, no convolutional
    decoder, no alignment stage 1. The learning rate is not scaled by the batch."""
    low, high = preset.model.latent_size, preset.model.image_size
    first = dataclasses.replace(
        preset.autoencoder,
        decoder="implicit",
        kl_weight=0.0,
        lr=4.5e-6,
        global_batch=8,
        min_size=low,
        max_size=high,
        max_aspect=_MAX_ASPECT,
    )
    return dataclasses.replace(preset, autoencoder=first)
