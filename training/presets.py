"""Presets: a model and the settings of its stages, as functions. The command line overrides single fields.

The paper's presets carry its sizes, learning rates and size ranges; batch sizes and steps are for eight GPUs and yours
to change. `demo` learns something visible in minutes on two CPU cores; `debug` only proves that everything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig, ScheduleConfig
from pipeline.errors import UserError
from training.config import AlignStage, AutoencoderStage, DecoderStage, DenoiserStage, DistillStage, Preset

_VQ_F4 = AutoencoderConfig(kind="vq", latent_channels=3, base_width=128, width_mult=(1, 2, 4), num_embeddings=8192)
_KL_F8 = AutoencoderConfig(kind="kl", latent_channels=4, base_width=128, width_mult=(1, 2, 4, 4))
_DECODER_F4 = DecoderConfig(base_width=128, width_mult=(1, 2, 4), num_res_blocks=2)
_DECODER_F8 = DecoderConfig(base_width=128, width_mult=(1, 2, 4, 4), num_res_blocks=2)
_LDM_F4 = DenoiserConfig(base_width=224, width_mult=(1, 2, 3, 4), attention_factors=(2, 4, 8), head_channels=32)
_LDM_F8 = DenoiserConfig(base_width=192, width_mult=(1, 2, 2, 4, 4), attention_factors=(1, 2, 4, 8), head_channels=32)
_LDM_SR = DenoiserConfig(base_width=160, width_mult=(1, 2, 2, 4), attention_factors=(4, 8), head_channels=32)
_FACES_SR = ScheduleConfig(beta_start=1e-4, beta_end=0.015)
_WEAKER_NOISE = ScheduleConfig(beta_start=0.0015, beta_end=0.0155)


def demo(minutes: float = 10.0) -> Preset:
    """Crops of one picture at 64 pixels on two CPU cores; `minutes` for everything scales the number of steps.

    The decoder has the light head and no normalisation: after these few steps it is 2.4 dB ahead of the paper's.
    """
    effort = max(0.02, (minutes - 4.0) / 6.0)  # four of the ten minutes do not train
    common: dict[str, Any] = {
        "log_every": 10,
        "checkpoint_every": 100,
        "keep": 2,
        "warmup_steps": 50,
        "schedule": "cosine",
        "beta2": 0.99,
        "ema_decay": 0.99,
    }

    def steps(num: int) -> dict[str, Any]:
        num = max(20, round(num * effort))
        return {"steps": num, "grid_every": max(10, num // 4)}

    return Preset(
        name="demo",
        model=ModelConfig(
            name="latentzoom-demo",
            image_size=64,
            schedule=ScheduleConfig(prediction="v"),  # steadier than eps after minutes of training
            autoencoder=AutoencoderConfig(
                kind="kl",
                latent_channels=3,
                base_width=16,
                width_mult=(1, 2, 2),
                num_res_blocks=1,
                mid_attention=False,
                norm_groups=2,
            ),
            decoder=DecoderConfig(
                kind="light",
                norm="none",
                base_width=32,
                width_mult=(1, 2),
                num_res_blocks=1,
                mid_attention=False,
            ),
            denoiser=DenoiserConfig(
                base_width=32,
                width_mult=(1, 2, 4),
                num_res_blocks=1,
                attention_factors=(2, 4),
                head_channels=32,
                norm_groups=8,
            ),
        ),
        autoencoder=AutoencoderStage(global_batch=4, lr=5e-4, start="linear", **steps(500), **common),
        decoder=DecoderStage(global_batch=8, lr=1e-3, start="linear", min_size=32, crop=32, **steps(500), **common),
        denoiser=DenoiserStage(global_batch=16, lr=2e-3, **steps(1500), **{**common, "ema_decay": 0.995}),
        align=AlignStage(global_batch=8, lr=1e-4, crop=32, **steps(80), **common),
    )


def _starter_model(look: str) -> ModelConfig:
    """Direct super-resolution in pixel space: the latent is the low-resolution picture itself (f = 1), D_phi has no
    normalisation, the head is the light one."""
    return ModelConfig(
        name=f"latentzoom-starter-{look}",
        task="direct",
        image_size=256,
        autoencoder=AutoencoderConfig(kind="identity", latent_channels=3, width_mult=(1,)),
        decoder=DecoderConfig(
            kind="light",
            norm="none",
            inputs="condition",
            base_width=32,
            width_mult=(1,),
            num_res_blocks=9,
            mid_attention=False,
            light_width=32,
            light_depth=3,
        ),
    )


def starter() -> Preset:
    """Super-resolution of photographs, trained on two CPU cores in hours: the model that ships, its look "faithful".

    L1, as EDSR and LIIF train; scales 1.1 to 5 are drawn anew for every step, in all eight orientations.
    """
    return Preset(
        name="starter",
        model=_starter_model("faithful"),
        decoder=DecoderStage(
            steps=11_000,
            global_batch=16,
            lr=1e-3,
            beta2=0.99,
            warmup_steps=200,
            schedule="cosine",
            ema_decay=0.999,
            precision="bf16",
            channels_last=True,
            start="linear",
            min_scale=1.1,
            max_scale=5.0,
            input_cells=48,
            crop=64,
            scattered=True,
            turns=True,
            checkpoint_every=500,
            log_every=100,
            grid_every=2000,
        ),
    )


def starter_sharp() -> Preset:
    """The starter's look "sharp": the faithful one continued with a perceptual term (LPIPS on VGG16)."""
    return Preset(
        name="starter-sharp",
        model=_starter_model("sharp"),
        decoder=DecoderStage(
            steps=1_500,
            global_batch=8,
            lr=3e-4,
            beta2=0.99,
            warmup_steps=50,
            schedule="cosine",
            ema_decay=0.995,
            precision="bf16",
            channels_last=True,
            start="bundle",
            perceptual_weight=1.0,
            lpips_weights="vgg16",
            min_scale=1.5,
            max_scale=5.0,
            input_cells=48,
            crop=64,
            turns=True,
            checkpoint_every=250,
            log_every=50,
            grid_every=500,
        ),
    )


def debug() -> Preset:
    """Networks of a few thousand parameters on 32-pixel images: seconds for all stages."""
    common: dict[str, Any] = {
        "steps": 4,
        "global_batch": 4,
        "log_every": 1,
        "checkpoint_every": 2,
        "ema_decay": 0.9,
        "lr": 1e-3,
    }
    return Preset(
        name="debug",
        model=ModelConfig(
            name="debug",
            image_size=32,
            autoencoder=AutoencoderConfig(
                kind="kl",
                latent_channels=3,
                base_width=8,
                width_mult=(1, 1, 2),
                num_res_blocks=1,
                mid_attention=False,
                norm_groups=4,
            ),
            decoder=DecoderConfig(
                base_width=8,
                width_mult=(1, 2),
                num_res_blocks=1,
                mid_attention=False,
                norm_groups=4,
                mlp_width=16,
                mlp_depth=2,
            ),
            denoiser=DenoiserConfig(
                base_width=8,
                width_mult=(1, 2),
                num_res_blocks=1,
                attention_factors=(2,),
                head_channels=8,
                norm_groups=4,
            ),
        ),
        autoencoder=AutoencoderStage(**common),
        decoder=DecoderStage(**common),
        denoiser=DenoiserStage(**common),
        align=AlignStage(**common),
        distill=DistillStage(**common),
    )


def ffhq_256() -> Preset:
    """Generation of faces, 256 pixels, VQ f = 4; targets of 64 to 256 pixels."""
    model = ModelConfig(name="ffhq-256", image_size=256, autoencoder=_VQ_F4, decoder=_DECODER_F4, denoiser=_LDM_F4)
    return _paper(model, denoiser_lr=8e-5)


def celebahq_sr_16_128() -> Preset:
    """Super-resolution of faces from 16 pixels, trained at 128; targets of 32 to 128 pixels."""
    model = ModelConfig(
        name="celebahq-sr-16-128",
        task="sr",
        image_size=128,
        lr_size=16,
        condition_resize="nearest",
        autoencoder=_VQ_F4,
        decoder=_DECODER_F4,
        denoiser=_LDM_SR,
        schedule=_FACES_SR,
    )
    return _paper(model, denoiser_lr=1e-4)


def lsun_bedroom_256() -> Preset:
    """Generation of bedrooms, 256 pixels, VQ f = 4; targets of 64 to 256 pixels."""
    model = ModelConfig(
        name="lsun-bedroom-256", image_size=256, autoencoder=_VQ_F4, decoder=_DECODER_F4, denoiser=_LDM_F4
    )
    return _paper(model, denoiser_lr=8e-5)


def lsun_church_256() -> Preset:
    """Generation of churches, 256 pixels, KL f = 8; targets of 32 to 256 pixels."""
    model = ModelConfig(
        name="lsun-church-256",
        image_size=256,
        autoencoder=_KL_F8,
        decoder=_DECODER_F8,
        denoiser=_LDM_F8,
        schedule=_WEAKER_NOISE,
    )
    return _paper(model, denoiser_lr=5e-5)


def lsun_tower_sr_256() -> Preset:
    """Super-resolution of towers from 16 pixels (16×), trained at 256; targets of 64 to 256 pixels."""
    model = ModelConfig(
        name="lsun-tower-sr-256",
        task="sr",
        image_size=256,
        lr_size=16,
        condition_resize="nearest",
        autoencoder=_VQ_F4,
        decoder=_DECODER_F4,
        denoiser=_LDM_SR,
        schedule=_FACES_SR,
    )
    return _paper(model, denoiser_lr=1e-4)


def div2k_sr() -> Preset:
    """Super-resolution of photographs, 48 to 192 pixels (4×); targets of 48 to 192 pixels."""
    model = ModelConfig(
        name="div2k-sr",
        task="sr",
        image_size=192,
        lr_size=48,
        condition_resize="bicubic",
        autoencoder=_VQ_F4,
        decoder=_DECODER_F4,
        denoiser=_LDM_SR,
        schedule=_WEAKER_NOISE,
    )
    return _paper(model, denoiser_lr=1e-4)


def _paper(model: ModelConfig, *, denoiser_lr: float) -> Preset:
    """The paper's training: Adam; 5e-5 for the decoder, 1e-6 for the alignment, EMA 0.9999, bf16 under ZeRO 1.

    Alignment stage 2 renders a window of 12 × 12 latent cells of each target, and D_phi sees 4 cells around it: the
    work is the same for every target size, little more than the denoiser's. docs/verbs/train.md has the figures.
    """
    common: dict[str, Any] = {
        "precision": "bf16",
        "zero_stage": 1,
        "clip_norm": 1.0,
        "checkpoint_every": 2000,
        "grid_every": 2000,
        "log_every": 50,
        "channels_last": True,
    }
    low, high = model.latent_size, model.image_size
    return Preset(
        name=model.name,
        model=model,
        autoencoder=AutoencoderStage(steps=200_000, global_batch=32, lr=3.6e-5, ema_decay=0.9999, **common),
        decoder=DecoderStage(steps=200_000, global_batch=32, lr=5e-5, min_size=low, max_size=high, crop=128, **common),
        denoiser=DenoiserStage(
            steps=500_000, global_batch=96, lr=denoiser_lr, ema_decay=0.9999, warmup_steps=10_000, **common
        ),
        align=AlignStage(
            steps=50_000,
            global_batch=32,
            lr=1e-6,
            min_size=low,
            max_size=high,
            crop_cells=12,
            context_cells=4,
            **common,
        ),
        distill=DistillStage(
            steps=30_000,
            global_batch=32,
            lr=5e-5,
            warmup_steps=1_000,
            min_size=low,
            max_size=high,
            crop_cells=12,
            context_cells=4,
            **common,
        ),
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "demo": demo,
    "starter": starter,
    "starter-sharp": starter_sharp,
    "debug": debug,
    "ffhq-256": ffhq_256,
    "celebahq-sr-16-128": celebahq_sr_16_128,
    "lsun-bedroom-256": lsun_bedroom_256,
    "lsun-church-256": lsun_church_256,
    "lsun-tower-sr-256": lsun_tower_sr_256,
    "div2k-sr": div2k_sr,
}


def get_preset(name: str) -> Preset:
    """A preset by name; `UserError` listing the names when there is none."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
