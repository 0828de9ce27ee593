"""Tiny bundles with random weights for the orchestration tests."""

from dataclasses import replace

import torch

from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, save_bundle
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig

torch.set_num_threads(2)


def tiny_config(task="generation"):
    return ModelConfig(
        name="tiny",
        task=task,
        image_size=32,
        lr_size=8 if task == "sr" else 0,
        autoencoder=AutoencoderConfig(base_width=8, width_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4),
        decoder=DecoderConfig(
            base_width=8, width_mult=(1, 2), num_res_blocks=1, norm_groups=4, mlp_width=16, mlp_depth=2
        ),
        denoiser=DenoiserConfig(
            base_width=8, width_mult=(1, 2), num_res_blocks=1, attention_factors=(2,), head_channels=8, norm_groups=4
        ),
    )


def make_bundle(url, seed=0, task="generation", config=None, distilled_steps=0):
    torch.manual_seed(seed)
    config = config or tiny_config(task)
    if distilled_steps:
        schedule = replace(config.schedule, prediction="x0", distilled_steps=distilled_steps)
        config = replace(config, schedule=schedule)
    bundle = Bundle(
        config=config,
        autoencoder=build_autoencoder(config),
        decoder=build_decoder(config),
        denoiser=build_denoiser(config),
        meta={"stages": {"decoder": "run-1"}},
        card="# tiny\n\nA model for tests.\n",
    )
    save_bundle(str(url), bundle)
    return str(url)
