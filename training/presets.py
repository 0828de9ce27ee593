"""Presets: a model and the settings of its stages, as functions. The command line overrides single fields.

The paper's are in `training.paper_presets`. `demo` learns something visible in minutes on two CPU cores; `starter`
makes the model that ships; `debug` only proves that everything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.common_options import did_you_mean
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig, ScheduleConfig
from pipeline.errors import UserError
from training import paper_presets as paper
from training.config import AlignStage, AutoencoderStage, DecoderStage, DenoiserStage, DistillStage, Preset


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
        # Held-out figures cost less than 3 % of a stage; of one with fewer steps they would cost more.
        often = {"validate_every": num // 2 if num >= 200 else 0, "validate_samples": 16, "bundle_every": 100}
        return {"steps": num, "grid_every": max(10, num // 4), **often}

    def last_steps(num: int) -> dict[str, Any]:
        found = steps(num)
        return {**found, "validate_every": found["steps"] if found["steps"] >= 60 else 0, "validate_samples": 4}

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
        autoencoder=AutoencoderStage(
            global_batch=4, lr=5e-4, start="linear", kl_weight=1e-6 * 3 * 64 * 64, **steps(500), **common
        ),
        decoder=DecoderStage(
            global_batch=8, lr=1e-3, start="linear", min_size=32, max_aspect=1.5, crop=32, **steps(500), **common
        ),
        denoiser=DenoiserStage(global_batch=16, lr=2e-3, **steps(1500), **{**common, "ema_decay": 0.995}),
        align=AlignStage(global_batch=8, lr=1e-4, max_aspect=1.5, crop=32, **last_steps(80), **common),
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
            steps=20_000,
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
            validate_every=2000,
            validate_samples=32,
            bundle_every=500,
        ),
    )


def starter_sharp() -> Preset:
    """The starter's look "sharp": the faithful one continued with a perceptual term (LPIPS on VGG16)."""
    return Preset(
        name="starter-sharp",
        model=_starter_model("sharp"),
        decoder=DecoderStage(
            steps=2_000,
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
            validate_every=500,
            validate_samples=8,
            bundle_every=250,
        ),
    )


def debug() -> Preset:
    """Networks of a few thousand parameters on 32-pixel images: seconds for all stages."""
    common: dict[str, Any] = {
        "steps": 4,
        "global_batch": 4,
        "log_every": 1,
        "checkpoint_every": 2,
        "validate_every": 2,
        "validate_samples": 4,
        "bundle_every": 2,
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


PRESETS: dict[str, Callable[[], Preset]] = {
    "demo": demo,
    "starter": starter,
    "starter-sharp": starter_sharp,
    "debug": debug,
    "ffhq-256": paper.ffhq_256,
    "celebahq-sr-16-128": paper.celebahq_sr_16_128,
    "lsun-bedroom-256": paper.lsun_bedroom_256,
    "lsun-church-256": paper.lsun_church_256,
    "lsun-tower-sr-256": paper.lsun_tower_sr_256,
    "div2k-sr": paper.div2k_sr,
    "df2k-sr": paper.df2k_sr,
}


def get_preset(name: str) -> Preset:
    """A preset by name; `UserError` listing the names when there is none."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}{did_you_mean(name, PRESETS)}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
