"""The paper's presets are its released configurations, field by field, with the published numbers of parameters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.bundle import build_autoencoder, build_decoder, build_denoiser
from pipeline.config import to_dict
from pipeline.errors import UserError
from training.config import override, preset_from_dict, preset_to_dict
from training.presets import PRESETS, demo, get_preset
from training.targets import size_range

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))
from reference_ldm import FirstStage, UNet

# Sources: [A] the paper's code, github.com/zhenshij/arbitrary-scale-diffusion, configs/; [L] github.com/CompVis/
# latent-diffusion (its LSUN and kl-f8 files also in CompVis/stable-diffusion), configs/ and models/; [T] the training
# settings of LDM's paper, table 12 (arXiv 2112.10752); [P] the paper itself (arXiv 2403.10255).
_FIRST_STAGE: dict[str, Any] = {
    "base_width": 128,
    "num_res_blocks": 2,
    "attention_levels": [],
    "mid_attention": True,  # LDM's middle block always attends
    "num_embeddings": 8192,
    "norm_groups": 32,
}
VQ_F4 = {**_FIRST_STAGE, "kind": "vq", "latent_channels": 3, "width_mult": [1, 2, 4]}  # [L] first_stage_models/vq-f4
KL_F8 = {**_FIRST_STAGE, "kind": "kl", "latent_channels": 4, "width_mult": [1, 2, 4, 4]}  # [L] first_stage_models/kl-f8
# [A] first_stage_sr_ffhq_16_32x32x32_128: attn_resolutions [16] of 128 pixels is level 3, which does not exist
KL_FACES = {**KL_F8, "latent_channels": 32, "width_mult": [1, 2, 4], "attention_levels": [3]}
KL_TOWER = {**KL_F8, "latent_channels": 32}  # [A] first_stage_sr_tower_16_32x32x32_256

_UNET: dict[str, Any] = {
    "num_res_blocks": 2,
    "head_channels": 32,
    "norm_groups": 32,
    "dropout": 0.0,
    "num_heads": 0,
    "scale_shift": False,
    "resample": "conv",
    "condition_noise": 0.0,  # this project's
}
# [L] ffhq-ldm-vq-4, lsun_bedrooms-ldm-vq-4
LDM_F4 = {**_UNET, "base_width": 224, "width_mult": [1, 2, 3, 4], "attention_factors": [2, 4, 8]}
# [L] lsun_churches-ldm-kl-8; it counts heads, so that their width has no effect
LDM_CHURCHES = {
    **_UNET,
    "base_width": 192,
    "width_mult": [1, 2, 2, 4, 4],
    "attention_factors": [1, 2, 4, 8],
    "num_heads": 8,
    "scale_shift": True,
    "resample": "resnet",
}
# [A] ldm_sr_div2k_48_48x48x3_192, as [L] models/ldm/bsr_sr; factor 16 has no level
BSR = {**_UNET, "base_width": 160, "width_mult": [1, 2, 2, 4], "attention_factors": [8, 16]}
DF2K = {**BSR, "attention_factors": [6, 12]}  # [A] ldm_sr_df2k_48_48x48x3_192; no level has them
SR = {**_UNET, "base_width": 256, "width_mult": [1, 2, 4, 4], "attention_factors": [1, 2, 4]}  # [A] ldm_sr_ffhq_16_...

TABLE: dict[str, dict[str, Any]] = {
    "ffhq-256": {
        "sizes": (256, 0, 4, 64),  # image, LR, f, latent
        "autoencoder": VQ_F4,
        "targets": (64, 256),  # [A] first_stage_gen_ffhq_64_64x64x3_256: gt_min, gt_max
        "denoiser": LDM_F4,
        "betas": (0.0015, 0.0195),
        "lr": 8.4e-5,  # [T]
        "published": (None, 274),  # parameters: of the first stage, and millions of the denoiser [T]
    },
    "celebahq-sr-16-128": {
        "sizes": (128, 16, 4, 32),
        "autoencoder": KL_FACES,
        "targets": (32, 128),
        "denoiser": SR,
        "betas": (1e-4, 0.015),
        "lr": 1e-4,  # [P]; the file has the alignment's 1e-6
        "joint": True,
    },
    "lsun-tower-sr-256": {
        "sizes": (256, 16, 8, 32),
        "autoencoder": KL_TOWER,
        "targets": (32, 256),
        "denoiser": SR,  # no file was published
        "betas": (1e-4, 0.015),
        "lr": 1e-4,
        "joint": True,
    },
    "div2k-sr": {
        "sizes": (192, 48, 4, 48),
        "autoencoder": VQ_F4,
        "targets": (48, 192),  # [A] first_stage_sr_div2k_48_48x48x3_192
        "denoiser": BSR,
        "betas": (0.0015, 0.0155),
        "lr": 1e-4,
    },
    "df2k-sr": {
        "sizes": (192, 48, 4, 48),
        "autoencoder": VQ_F4,
        "targets": (48, 192),
        "denoiser": DF2K,
        "betas": (0.0015, 0.0155),
        "lr": 1e-4,
    },
    "lsun-church-256": {
        "sizes": (256, 0, 8, 32),
        "autoencoder": KL_F8,
        "targets": (32, 256),
        "denoiser": LDM_CHURCHES,
        "betas": (0.0015, 0.0155),
        "lr": 5e-5,
        "warmup": 10_000,
        "loss": "l1",
        "published": (83_653_863, 294),  # kl-f8 is Stable Diffusion's first stage; [T]
    },
    "lsun-bedroom-256": {
        "sizes": (256, 0, 4, 64),
        "autoencoder": VQ_F4,
        "targets": (64, 256),
        "denoiser": LDM_F4,
        "betas": (0.0015, 0.0195),
        "lr": 9.6e-5,  # [T]
        "published": (None, 274),
    },
}


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_its_row_of_the_released_configurations(name: str) -> None:
    preset, row = get_preset(name), TABLE[name]
    model, (image, lr_size, factor, latent) = preset.model, row["sizes"]
    is_sr, is_joint, is_drawn = lr_size > 0, row.get("joint", False), row["autoencoder"]["kind"] == "kl"
    assert to_dict(model) == {
        "name": name,
        "task": "sr" if is_sr else "generation",
        "image_size": image,
        "lr_size": lr_size,
        "condition_resize": "nearest" if is_sr else "bicubic",  # of no effect for generation
        "scale_factor": 1.0,  # measured
        "autoencoder": row["autoencoder"],
        "decoder": {  # [A] ddconfig without up-sampling, liifconfig [256, 256, 256, 256]
            **{k: v for k, v in row["autoencoder"].items() if k not in ("kind", "latent_channels", "num_embeddings")},
            "kind": "liif",
            "norm": "group",
            "inputs": "latent",
            "attention_levels": [],
            "mlp_width": 256,
            "mlp_depth": 4,
            "light_width": 64,
            "light_depth": 3,
        },
        "denoiser": row["denoiser"],
        "schedule": {
            "num_steps": 1000,
            "beta_start": row["betas"][0],
            "beta_end": row["betas"][1],
            "prediction": "eps",
            "zero_terminal_snr": False,  # as the next, this project's
            "distilled_steps": 0,
        },
    }
    assert (model.autoencoder.factor, model.latent_size) == (factor, latent)
    first, decoder, denoiser, align = preset.autoencoder, preset.decoder, preset.denoiser, preset.align
    for stage in (decoder, align, *([first] if is_joint else [])):
        assert (stage.min_size, stage.max_size) == size_range(stage, model) == row["targets"]
    if is_joint:  # [A] FirstStageModel: plain L1 of a sample of the posterior; base_learning_rate, --scale_lr False
        terms = (first.kl_weight, first.perceptual_weight, first.adversarial_weight)
        assert (first.decoder, *terms) == ("implicit", 0, 0, 0)
        assert (first.lr, first.global_batch, first.crop) == (4.5e-6, 8, 0)
    else:
        assert first.decoder == "convolutional"
    assert preset.stages == ("autoencoder", *([] if is_joint else ["decoder"]), "denoiser", "align")
    assert (decoder.lr, decoder.loss, align.lr) == (5e-5, "l1", 1e-6)  # [P]
    assert decoder.sample_latents == is_drawn  # [A] FirstStageModel samples the posterior of a frozen encoder too
    for stage in (decoder, align, preset.distill, *([first] if is_joint else [])):
        assert stage.max_aspect == 1.5  # this project's: models are asked for pictures that are not square
    assert (align.lambda_dm, align.lambda_recon) == (1.0, 1.0)
    assert (denoiser.lr, denoiser.warmup_steps, denoiser.ema_decay) == (row["lr"], row.get("warmup", 0), 0.9999)
    assert denoiser.loss == align.loss == row.get("loss", "l2")
    assert denoiser.sample_latents == align.sample_latents == is_drawn
    assert all(preset.stage(stage).weight_decay == 0 for stage in preset.stages)  # plain Adam


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def published(row: dict[str, Any]) -> dict[str, int]:
    """Parameters of the networks that the published files describe, built plainly and independently of ours."""
    ae, unet = row["autoencoder"], row["denoiser"]
    widths, channels = [ae["base_width"] * m for m in ae["width_mult"]], ae["latent_channels"]
    is_kl, none = ae["kind"] == "kl", [False] * len(ae["width_mult"])
    codes = 0 if is_kl else ae["num_embeddings"]
    first = FirstStage(widths, ae["num_res_blocks"], none, channels, kl=is_kl, codes=codes)
    blocks = [block for level in first.decoder.up for block in level.block]  # D_phi: no up-sampling, no output layers
    mlp = [nn.Linear(widths[0] + 4, 256), *(nn.Linear(256, 256) for _ in range(3)), nn.Linear(256, 3)]
    heads = {"num_heads": unet["num_heads"]} if unet["num_heads"] else {"head_channels": unet["head_channels"]}
    shape = (unet["base_width"], unet["width_mult"], unet["num_res_blocks"], unet["attention_factors"])
    denoiser = UNet(channels, *shape, fancy=unet["scale_shift"], **heads)
    condition = 9 * channels * unet["base_width"] if row["sizes"][1] else 0  # beside the input of a 3 × 3 convolution
    return {
        "first stage": count(first.encoder, first.quant_conv) if row.get("joint") else count(first),
        "implicit decoder": count(first.post_quant_conv, first.decoder.conv_in, first.decoder.mid, *blocks, *mlp),
        "denoiser": count(denoiser) + condition,
    }


def test_presets_have_the_published_numbers_of_parameters() -> None:
    """`pytest -s` prints the table."""
    print(f"\n{'preset':20} {'part':18} {'ours':>13} {'published':>13}")
    with torch.device("meta"):
        for name, row in TABLE.items():
            model, has_decoder = get_preset(name).model, not row.get("joint")
            parts = build_autoencoder(model, has_decoder=has_decoder), build_decoder(model), build_denoiser(model)
            theirs = published(row)
            for (part, number), network in zip(theirs.items(), parts):
                print(f"{name:20} {part:18} {count(network):>13,} {number:>13,}")
                assert count(network) == number, (name, part)
            first, denoiser = row.get("published", (None, None))
            assert first is None or theirs["first stage"] == first
            assert denoiser is None or theirs["denoiser"] // 10**6 == denoiser


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    assert preset_from_dict(preset_to_dict(get_preset(name))) == get_preset(name)


def test_every_preset_of_the_paper_is_in_the_table() -> None:
    assert set(PRESETS) - set(TABLE) == {"demo", "starter", "starter-sharp", "debug"}


def test_more_minutes_train_the_demo_longer() -> None:
    assert demo(60).denoiser.steps > 5 * demo(10).denoiser.steps
    assert demo(60).model == demo(10).model


def test_unknown_names_are_errors() -> None:
    with pytest.raises(UserError, match="no preset 'ffhq'"):
        get_preset("ffhq")
    with pytest.raises(UserError, match="no setting 'denoiser.learning_rate'"):
        override(get_preset("debug"), ["denoiser.learning_rate=1"])
