"""Noise on super-resolution conditions: its law, what the denoiser is told, and the strength that sampling sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small_bundle, small_config

from pipeline.bundle import Bundle, build_denoiser, load_bundle, save_bundle
from pipeline.diffusion import noisy_condition
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.tiling import Tiling


def noisy_bundle(condition_noise: float = 0.5) -> Bundle:
    """A super-resolution model whose denoiser listens to the strength, as one does after some training."""
    bundle = small_bundle("sr")
    denoiser = dataclasses.replace(bundle.config.denoiser, condition_noise=condition_noise)
    config = dataclasses.replace(bundle.config, denoiser=denoiser)
    torch.manual_seed(0)
    built = build_denoiser(config).eval().requires_grad_(False)
    torch.nn.init.normal_(built.strength_embedding.linear_2.weight, std=0.5)
    return Bundle(config, bundle.autoencoder, bundle.decoder, built)


@pytest.fixture(scope="module")
def model() -> LatentZoom:
    return LatentZoom(noisy_bundle())


def test_the_noise_keeps_the_variance_and_zero_changes_nothing() -> None:
    torch.manual_seed(0)
    condition, noise = torch.randn(3, 3, 64, 64), torch.randn(3, 3, 64, 64)
    made = noisy_condition(condition, noise, torch.tensor([0.0, 0.3, 0.9]))
    assert torch.equal(made[0], condition[0])
    assert made.std(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 3, abs=0.03)
    for image, strength in ((1, 0.3), (2, 0.9)):
        likeness = torch.corrcoef(torch.stack([made[image].flatten(), condition[image].flatten()]))[0, 1]
        assert float(likeness) == pytest.approx((1 - strength**2) ** 0.5, abs=0.02)


def test_a_new_denoiser_does_not_heed_the_strength_and_has_the_other_weights_of_one_without() -> None:
    plain = small_config("sr")
    config = dataclasses.replace(plain, denoiser=dataclasses.replace(plain.denoiser, condition_noise=0.5))
    without, told = build_denoiser(plain).eval(), build_denoiser(config).eval()
    more = set(told.state_dict()) - set(without.state_dict())
    assert more and all(name.startswith("strength_embedding.") for name in more)
    told.load_state_dict(without.state_dict(), strict=False)
    z, t, condition = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.randn(2, 3, 8, 8)
    expected = without(z, t, condition)
    assert torch.equal(told(z, t, condition), expected)
    assert torch.equal(told(z, t, condition, torch.tensor([0.1, 0.4])), expected)


def test_the_denoiser_is_told_the_strength_of_each_image(model: LatentZoom) -> None:
    denoiser = model.denoiser
    assert denoiser is not None
    z, t, condition = torch.randn(2, 3, 8, 8), torch.tensor([300, 300]), torch.randn(2, 3, 8, 8)
    none, both = denoiser(z, t, condition), denoiser(z, t, condition, torch.tensor([0.0, 0.4]))
    assert torch.equal(none[0], both[0]) and float((none[1] - both[1]).abs().max()) > 1e-3


def test_sampling_sets_the_strength(model: LatentZoom) -> None:
    """The condition gets noise and the denoiser the strength; nothing else is drawn anew. Zero is the default."""
    condition = torch.randn(2, 3, 8, 8)
    options = {"condition": condition, "num_steps": 2, "seed": 5}
    plain, zero = model.sample_latents(**options), model.sample_latents(**options, condition_noise=0.0)
    made = model.sample_latents(**options, condition_noise=0.3)
    assert torch.equal(plain, zero) and float((plain - made).abs().max()) > 1e-2
    assert torch.equal(made, model.sample_latents(**options, condition_noise=0.3))
    alone = model.sample_latents(condition=condition[1:], num_steps=2, seed=6, condition_noise=0.3)
    torch.testing.assert_close(alone[0], made[1], rtol=1e-4, atol=1e-5)  # an image's noise does not depend on the batch
    tiled = model.sample_latents(**options, condition_noise=0.3, tiling=Tiling(8, 2, 2))
    torch.testing.assert_close(tiled, made)


def test_upscale_takes_a_strength_in_half_precision_too(model: LatentZoom) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    plain, made = (np.asarray(model.upscale(picture, 3, num_steps=2, condition_noise=s)) for s in (0.0, 0.4))
    assert made.shape == (24, 24, 3) and not np.array_equal(plain, made)
    half = LatentZoom(noisy_bundle(), dtype=torch.bfloat16)
    assert half.upscale(picture, 3, num_steps=2, condition_noise=0.4).size == (24, 24)


def test_it_travels_in_the_bundle(tmp_path: Path) -> None:
    save_bundle(str(tmp_path), noisy_bundle(0.25))
    assert load_bundle(str(tmp_path)).config.denoiser.condition_noise == 0.25


def test_bad_input(model: LatentZoom) -> None:
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    for strength in (0.6, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"condition_noise = .* is not allowed; .* trained with up to 0.5"):
            model.upscale(picture, 2, num_steps=2, condition_noise=strength)
    for task in ("sr", "generation"):
        with pytest.raises(UserError, match=r"condition_noise = 0.1 is not allowed; this model was trained with 0$"):
            LatentZoom(small_bundle(task)).upscale(picture, 2, num_steps=2, condition_noise=0.1)
    with pytest.raises(UserError, match="num_steps = 0 renders the condition itself"):
        model.upscale(picture, 2, num_steps=0, condition_noise=0.1)
    config = small_config("generation")
    with pytest.raises(UserError, match=r"denoiser.condition_noise = 0.1 .* 0 for every task but 'sr'"):
        dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, condition_noise=0.1))
    with pytest.raises(UserError, match="0 <= condition_noise < 1"):
        dataclasses.replace(config.denoiser, condition_noise=1.0)
    denoiser = LatentZoom(small_bundle("sr")).denoiser
    assert denoiser is not None
    z = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="takes no strength"):
        denoiser(z, torch.tensor([1]), z, torch.tensor([0.1]))
