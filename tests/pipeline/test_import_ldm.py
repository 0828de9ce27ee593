"""Latent-diffusion checkpoints: first stages and U-Nets compute what plain networks with the same weights compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from reference_ldm import FirstStage, UNet
from small_models import relative_error
from torch import Tensor, nn

from pipeline.bundle import load_bundle, save_bundle
from pipeline.errors import UserError
from pipeline.importing.latent_diffusion import import_checkpoint
from pipeline.model import LatentZoom

AGREES = 1e-4
DD: dict[str, Any] = {
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
    "double_z": True,
}
UNET: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 3],
    "num_res_blocks": 2,
    "attention_resolutions": [1, 4],
    "num_head_channels": 16,
}


def stage_params(kind: str) -> dict[str, Any]:
    if kind == "kl":
        return {"embed_dim": 4, "ddconfig": DD}
    return {"embed_dim": 4, "n_embed": 24, "ddconfig": {**DD, "double_z": False, "attn_resolutions": []}}


def first_stage(kind: str) -> FirstStage:
    torch.manual_seed(3)
    if kind == "kl":
        return spread(FirstStage([32, 64, 64], 2, [False, True, False], 4, kl=True))
    return spread(FirstStage([32, 64, 64], 2, [False, False, False], 4, kl=False, codes=24))


def whole_params(**changes: Any) -> dict[str, Any]:
    """A diffusion model over the KL first stage."""
    return {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "image_size": 8,
        "channels": 4,
        "unet_config": {"target": "a.UNetModel", "params": UNET},
        "first_stage_config": {"target": "an.AutoencoderKL", "params": stage_params("kl")},
        **changes,
    }


M = TypeVar("M", bound=nn.Module)


def spread(module: M) -> M:
    """Norms and biases away from their start, so that a swapped pair of them shows."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval().requires_grad_(False)


def unet() -> UNet:
    torch.manual_seed(4)
    return spread(UNet(4, 32, [1, 2, 3], 2, [1, 4], head_channels=16))


def whole_checkpoint(ema_shift: float = 0.01) -> dict[str, Tensor]:
    state = {f"first_stage_model.{k}": v for k, v in first_stage("kl").state_dict().items()}
    for key, value in unet().state_dict().items():
        state[f"model.diffusion_model.{key}"] = value
        state["model_ema.diffusion_model" + key.replace(".", "")] = value + ema_shift
    state["first_stage_model.loss.discriminator.weight"] = torch.zeros(2)
    state["scale_factor"] = torch.tensor(0.5)
    state["model_ema.decay"] = torch.tensor(0.9999)
    return state


def write(folder: Path, params: dict[str, Any], state: dict[str, Tensor]) -> tuple[str, str]:
    config, checkpoint = folder / "config.yaml", folder / "last.ckpt"
    config.write_text(yaml.safe_dump({"model": {"base_learning_rate": 1e-6, "target": "a.Model", "params": params}}))
    torch.save({"state_dict": state, "epoch": 1}, checkpoint)
    return str(checkpoint), str(config)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_first_stage_alone(kind: str, tmp_path: Path) -> None:
    reference = first_stage(kind)
    state = reference.state_dict() | {"loss.logvar": torch.zeros(())}
    bundle = import_checkpoint(*write(tmp_path, stage_params(kind), state), "ldm")
    assert bundle.config.autoencoder.kind == kind and bundle.decoder is None and bundle.denoiser is None
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    moments = reference.moments(image)
    assert relative_error(bundle.autoencoder.moments(image), moments) < AGREES
    latent = moments[:, :4]
    assert relative_error(bundle.autoencoder.encode(image), latent) < AGREES
    assert relative_error(bundle.autoencoder.decode(latent), reference.decode(latent)) < AGREES


def test_whole_model(tmp_path: Path) -> None:
    paths = write(tmp_path, whole_params(), whole_checkpoint(ema_shift=0.01))
    z_t, t = torch.randn(2, 4, 8, 12), torch.tensor([3, 900])
    for weights, shift in (("ema", 0.01), ("raw", 0.0)):
        model = LatentZoom(import_checkpoint(*paths, "ldm", weights=weights))  # type: ignore[arg-type]
        reference = unet()
        for parameter in reference.parameters():
            parameter.data += shift
        assert relative_error(model.denoise(z_t, t), reference(z_t, t)) < AGREES
        assert model.bundle.meta["weights"] == weights
        assert model.config.scale_factor == 0.5 and model.config.image_size == 32
        assert model.config.decoder.widths == model.config.autoencoder.widths


def test_partial_bundle_can_be_saved_and_sampled(tmp_path: Path) -> None:
    from orchestration.cli import main

    checkpoint, config = write(tmp_path, whole_params(), whole_checkpoint())
    assert (
        main(
            [
                "import",
                "ldm",
                checkpoint,
                "--model-config",
                config,
                "--out",
                str(tmp_path / "bundle"),
                "--name",
                "bedrooms",
            ]
        )
        == 0
    )
    bundle = load_bundle(str(tmp_path / "bundle"))
    assert bundle.decoder is None and bundle.config.name == "bedrooms"
    model = LatentZoom(bundle)
    assert model.sample_latents(num=2, num_steps=2).shape == (2, 4, 8, 8)
    with pytest.raises(UserError, match="no implicit decoder"):
        model.generate()


@pytest.mark.parametrize("factors", [[1, 2, 4], [2], []])
def test_heads_counted_scale_shift_and_residual_resampling(factors: list[int], tmp_path: Path) -> None:
    """The other kind of U-Net in the family (its KL-f8 churches model): each level's heads are as many, not as wide."""
    options = {"num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True, "attention_resolutions": factors}
    unet_params = {key: value for key, value in UNET.items() if key != "num_head_channels"} | options
    torch.manual_seed(4)
    reference = spread(UNet(4, 32, [1, 2, 3], 2, factors, num_heads=4, fancy=True))
    state = {k: v for k, v in whole_checkpoint().items() if "diffusion_model" not in k}
    state |= {f"model.diffusion_model.{k}": v for k, v in reference.state_dict().items()}
    paths = write(tmp_path, whole_params(unet_config={"params": unet_params}), state)
    save_bundle(str(tmp_path / "bundle"), import_checkpoint(*paths, "ldm", weights="raw"))
    model = LatentZoom.load(str(tmp_path / "bundle"))
    z_t, t = torch.randn(2, 4, 8, 12), torch.tensor([3, 900])
    assert relative_error(model.denoise(z_t, t), reference(z_t, t)) < AGREES


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("dd", {"tanh_out": True}, "ddconfig.tanh_out = True"),
        ("dd", {"ch_mult": [2, 2, 2]}, "ch_mult"),
        ("dd", {"ch": "32"}, "ddconfig.ch must be int"),
        ("dd", {"z_channels": 3}, "embed_dim = 4"),
        ("unet", {"use_new_attention_order": True}, "use_new_attention_order"),
        ("unet", {"use_spatial_transformer": True}, "use_spatial_transformer"),
        ("unet", {"num_head_channels": -1}, "needs num_head_channels or num_heads"),
        ("unet", {"num_head_channels": -1, "num_heads": 5}, "num_heads = 5"),
        ("params", {"conditioning_key": "crossattn"}, "only unconditional"),
        ("params", {"beta_schedule": "cosine"}, "beta_schedule"),
        ("params", {"parameterization": "score"}, "parameterization"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    section: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    params = whole_params()
    if section == "dd":
        params["first_stage_config"] = {"params": {"embed_dim": 4, "ddconfig": {**DD, **change}}}
    elif section == "unet":
        params["unet_config"] = {"params": {**UNET, **change}}
    else:
        params |= change
    with pytest.raises(UserError, match=named):
        import_checkpoint(*write(tmp_path, params, {"model.diffusion_model.out.2.bias": torch.zeros(4)}), "ldm")
