"""Our networks and samplers compute what the released implementation computed (float32, relative error under 1e-4)."""

from __future__ import annotations

import pytest
import torch
from small_models import Released, relative_error

from pipeline.sampling import ddim_timesteps

AGREES = 1e-4


def test_encoder(released: Released) -> None:
    assert relative_error(released.ema.encode(released.vectors["image"]), released.vectors["latent"]) < AGREES


def test_features(released: Released) -> None:
    assert relative_error(released.ema.features(released.vectors["latent"]), released.vectors["features"]) < AGREES


@pytest.mark.parametrize("side", [19, 32, 53])
def test_decoded(released: Released, side: int) -> None:
    ours, theirs = released.ema.decode(released.vectors["latent"], (side, side)), released.vectors[f"decoded_{side}"]
    assert relative_error(ours, theirs) < AGREES
    assert float((ours - theirs).abs().max()) < 1e-5


def test_condition(released: Released) -> None:
    assert relative_error(released.ema.condition(released.vectors["image_lr"]), released.vectors["condition"]) < AGREES


def test_schedule(released: Released) -> None:
    abar = released.ema.schedule.abar
    assert relative_error(abar, released.weights["alphas_cumprod"]) < 1e-6
    assert relative_error(abar[released.vectors["t"]].sqrt(), released.vectors["sqrt_alpha_bar"]) < 1e-6
    assert relative_error((1 - abar[released.vectors["t"]]).sqrt(), released.vectors["sqrt_one_minus_alpha_bar"]) < 1e-6


def test_forward_process(released: Released) -> None:
    v = released.vectors
    z_t = released.raw.schedule.add_noise(v["latent"] * released.raw.config.scale_factor, v["noise"], v["t"])
    assert relative_error(z_t, v["x_noisy"]) < AGREES


def test_denoiser(released: Released) -> None:
    v = released.vectors
    eps_pred = released.raw.denoise(v["x_noisy"], v["t"], v["condition"])
    assert relative_error(eps_pred, v["model_output"]) < AGREES
    assert relative_error(released.raw.schedule.to_x0(v["x_noisy"], eps_pred, v["t"]), v["x0_pred"]) < AGREES


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_ddim(released: Released, weights: str) -> None:
    v = released.vectors
    model, name = (released.raw, "ddim10_eta0") if weights == "raw" else (released.ema, "ddim10_eta0_ema")
    assert ddim_timesteps(10) == v["ddim_timesteps"].tolist()
    latent = model.sample_latents(v["x_T"], v["condition"], num_steps=10, eta=0.0)
    assert relative_error(latent * model.config.scale_factor, v[name]) < AGREES


def test_ddim_decoded(released: Released) -> None:
    v = released.vectors
    latent = released.ema.sample_latents(v["x_T"], v["condition"], num_steps=10)
    assert torch.allclose(released.ema.decode(latent, (53, 53)), v["ddim10_eta0_ema_decoded"], rtol=0, atol=1e-5)


def test_raw_and_ema_weights_differ(released: Released) -> None:
    """Else the tests above could not tell which were imported."""
    v = released.vectors
    assert relative_error(v["ddim10_eta0"], v["ddim10_eta0_ema"]) > 0.01
