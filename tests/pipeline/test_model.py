"""LatentZoom: generate and upscale at any size, and one clear line for what cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import relative_error, small_bundle
from torch import Tensor

from pipeline.errors import UserError
from pipeline.geometry import MAX_SIDE
from pipeline.model import MAX_PIXELS, LatentZoom, target_size


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_generate_at_any_size(small: LatentZoom) -> None:
    images = small.generate(num=2, size=(19, 45), seed=3, num_steps=2)
    assert [image.size for image in images] == [(45, 19)] * 2 and images[0].mode == "RGB"
    assert pixels(images)[0].tolist() != pixels(images)[1].tolist()


def test_a_picture_depends_on_its_seed_alone(small: LatentZoom) -> None:
    """Not on how many are drawn, nor on the batches. At most one unit of 255: the last bits follow the batch size."""
    three = pixels(small.generate(num=3, size=(16, 24), seed=5, num_steps=3, batch_size=2))
    again = pixels(small.generate(num=3, size=(16, 24), seed=5, num_steps=3, batch_size=3))
    alone = pixels(small.generate(num=1, size=(16, 24), seed=6, num_steps=3))
    assert np.abs(three - again).max() <= 1 and np.abs(three[1] - alone[0]).max() <= 1


def test_every_size_comes_from_the_same_latent(small: LatentZoom) -> None:
    latent = small.sample_latents(num=1, seed=2, num_steps=2)
    for size in ((24, 40), (64, 64)):
        by_hand = small.decode(latent, size)
        drawn = pixels(small.generate(num=1, size=size, seed=2, num_steps=2, sampler="ddim"))[0]
        expected = ((by_hand[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
        assert np.abs(drawn - expected).max() <= 1


def test_latent_size_gives_other_shapes(small: LatentZoom) -> None:
    assert small.sample_latents(num=2, num_steps=2, latent_size=(4, 10)).shape == (2, 3, 4, 10)


@pytest.mark.parametrize(
    ("scale", "size", "expected"),
    [(5.3, None, (64, 48)), (1.0, None, (12, 9)), (None, (7, 31), (31, 7)), (0.5, None, (6, 4))],
)
def test_upscale(small_sr: LatentZoom, scale: float | None, size: Any, expected: tuple[int, int]) -> None:
    enlarged = small_sr.upscale(picture(12, 9), scale, size=size, num_steps=2)
    assert enlarged.size == expected


def test_upscale_with_a_generation_model_decodes_the_condition(small: LatentZoom) -> None:
    assert small.upscale(picture(6, 8), 3.0).size == (18, 24)


def test_condition_follows_the_lr_size(small_sr: LatentZoom) -> None:
    """Trained at 8 → 32 pixels: four times, and the latent is divisible by what the denoiser halves."""
    assert small_sr.high_resolution((8, 8)) == (32, 32)
    assert small_sr.high_resolution((10, 13)) == (40, 48)
    assert small_sr.condition(torch.zeros(2, 3, 10, 13)).shape == (2, 3, 10, 12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_denoise_gives_eps_whatever_the_model_predicts(prediction: Any) -> None:
    from dataclasses import replace

    bundle = small_bundle()
    bundle.config = replace(bundle.config, schedule=replace(bundle.config.schedule, prediction=prediction))
    model = LatentZoom(bundle)
    z_t, t = torch.randn(2, 3, 8, 8), torch.tensor([40, 900])
    assert bundle.denoiser is not None
    x0 = model.schedule.to_x0(z_t, bundle.denoiser(z_t, t), t)
    assert torch.allclose(model.schedule.add_noise(x0, model.denoise(z_t, t), t), z_t, atol=1e-4)


def test_methods_run_without_gradient() -> None:
    bundle = small_bundle()
    model = LatentZoom(bundle)
    for part in (bundle.autoencoder, bundle.decoder, bundle.denoiser):
        assert part is not None
        part.requires_grad_(True)
    z = torch.randn(1, 3, 8, 8)
    results = [model.encode(torch.zeros(1, 3, 32, 32)), model.decode(z, (9, 9)), model.denoise(z, torch.tensor([1]))]
    assert not any(result.requires_grad for result in results)


def test_bfloat16() -> None:
    exact, half = LatentZoom(small_bundle()), LatentZoom(small_bundle(), dtype=torch.bfloat16)
    latent = torch.randn(1, 3, 8, 8)
    image = half.decode(latent, (30, 50))
    assert image.dtype == torch.bfloat16 and relative_error(image, exact.decode(latent, (30, 50))) < 0.05


# --- bad input: one line that names the value -------------------------------------------------------------------------

T = torch.tensor([1, 2])


def nan(*shape: int) -> Tensor:
    tensor = torch.zeros(*shape)
    tensor.reshape(-1)[0] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8), (0, 8)), r"size \(0, 8\)"),
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8), (8, -8)), r"size \(8, -8\)"),
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8), (MAX_SIDE + 1, 8)), "1048577"),
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8), (MAX_SIDE, MAX_SIDE)), "decode it in windows"),
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8), (9, 9), (0, 0, 10, 9)), "window"),
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8), (9, 9), (0, 0, 9)), "window"),
        (lambda m: m.decode(torch.zeros(1, 4, 8, 8), (9, 9)), r"\(1, 4, 8, 8\)"),
        (lambda m: m.decode(nan(1, 3, 8, 8), (9, 9)), "NaN"),
        (lambda m: m.encode(torch.zeros(1, 1, 32, 32)), r"\(1, 1, 32, 32\)"),
        (lambda m: m.encode(torch.zeros(1, 3, 30, 32)), "multiples of 4"),
        (lambda m: m.encode(torch.zeros(1, 3, 0, 32)), r"\(1, 3, 0, 32\)"),
        (lambda m: m.encode(torch.zeros(3, 32, 32)), r"\(3, 32, 32\)"),
        (lambda m: m.encode(nan(1, 3, 32, 32)), "NaN"),
        (lambda m: m.condition(torch.zeros(1, 1, 8, 8)), r"\(1, 1, 8, 8\)"),
        (lambda m: m.condition(torch.zeros(3, 8, 8)), r"\(3, 8, 8\)"),
        (lambda m: m.denoise(torch.zeros(2, 3, 8, 8), torch.tensor([1, 1000])), "outside the schedule 0..999"),
        (lambda m: m.denoise(torch.zeros(2, 3, 8, 8), torch.tensor([-1, 1])), "outside the schedule"),
        (lambda m: m.denoise(torch.zeros(2, 3, 8, 8), torch.tensor([1])), r"t has shape \(1,\)"),
        (lambda m: m.denoise(torch.zeros(2, 3, 8, 8), torch.tensor([1.5, 2.0])), "whole numbers"),
        (lambda m: m.denoise(torch.zeros(2, 4, 8, 8), T), r"\(2, 4, 8, 8\)"),
        (lambda m: m.denoise(torch.zeros(2, 3, 7, 8), T), "multiples of 2"),
        (lambda m: m.denoise(nan(2, 3, 8, 8), T), "NaN"),
        (lambda m: m.denoise(torch.zeros(2, 3, 8, 8), T, torch.zeros(2, 3, 8, 8)), "unexpected condition"),
        (lambda m: m.sample_latents(num=0), "num = 0"),
        (lambda m: m.sample_latents(num_steps=0), "num_steps = 0"),
        (lambda m: m.sample_latents(num_steps=1001, sampler="dpm++"), "num_steps = 1001"),
        (lambda m: m.sample_latents(sampler="euler"), "'euler'"),
        (lambda m: m.sample_latents(eta=-0.1), "eta = -0.1"),
        (lambda m: m.sample_latents(eta=float("nan")), "eta = nan"),
        (lambda m: m.sample_latents(eta=float("inf")), "eta = inf"),
        (lambda m: m.sample_latents(seed=-1), "seed -1"),
        (lambda m: m.sample_latents(seed=1 << 63), "seed 9223372036854775808"),
        (lambda m: m.sample_latents(latent_size=(100_000, 100_000)), "a latent of 100000x100000 cells"),
        (lambda m: m.render(torch.zeros(1, 5, 8, 8), (9, 9)), r"features have shape \(1, 5, 8, 8\)"),
        (lambda m: m.render(nan(1, 8, 8, 8), (9, 9)), "feature map holds NaN"),
        (lambda m: m.sample_latents(seed=[1, 2]), "2 seeds for 1"),
        (lambda m: m.sample_latents(latent_size=(0, 8)), r"\(0, 8\)"),
        (lambda m: m.sample_latents(latent_size=(7, 8)), "multiples of 2"),
        (lambda m: m.sample_latents(nan(1, 3, 8, 8)), "NaN"),
        (lambda m: m.sample_latents(torch.zeros(1, 2, 8, 8)), r"\(1, 2, 8, 8\)"),
        (lambda m: m.generate(num=-1), "num = -1"),
        (lambda m: m.generate(size=(0, 0)), "size"),
        (lambda m: m.generate(batch_size=0), "batch_size = 0"),
        (lambda m: m.upscale(picture(8, 8)), "either a scale or a size"),
        (lambda m: m.upscale(picture(8, 8), 2.0, size=(9, 9)), "either a scale or a size"),
        (lambda m: m.upscale(picture(8, 8), -2.0), "scale = -2.0"),
        (lambda m: m.upscale(picture(8, 8), float("nan")), "scale = nan"),
        (lambda m: m.upscale(picture(8, 8), 1e9), "8000000000"),
    ],
)
def test_bad_input(small: LatentZoom, call: Any, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        call(small)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m.sample_latents(num=1), "needs a condition"),
        (lambda m: m.denoise(torch.zeros(2, 3, 8, 8), T), "needs a condition"),
        (
            lambda m: m.denoise(torch.zeros(2, 3, 8, 8), T, torch.zeros(2, 3, 8, 6)),
            r"condition has shape \(2, 3, 8, 6\)",
        ),
        (
            lambda m: m.denoise(torch.zeros(2, 3, 8, 8), T, torch.zeros(1, 3, 8, 8)),
            r"condition has shape \(1, 3, 8, 8\)",
        ),
        (lambda m: m.denoise(torch.zeros(2, 3, 8, 8), T, nan(2, 3, 8, 8)), "condition holds NaN"),
        (lambda m: m.sample_latents(condition=nan(1, 3, 8, 8)), "NaN"),
        (lambda m: m.sample_latents(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8)), r"\(1, 3, 8, 8\)"),
    ],
)
def test_bad_input_to_super_resolution(small_sr: LatentZoom, call: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        call(small_sr)


def test_the_limit_of_pixels_counts_the_window(small: LatentZoom) -> None:
    side = int(MAX_PIXELS**0.5) * 2
    assert small.decode(torch.zeros(1, 3, 8, 8), (side, side), (side - 3, 5, side, 9)).shape == (1, 3, 3, 4)


def test_target_size() -> None:
    assert target_size((9, 12), 5.3, None) == (48, 64) and target_size((9, 12), 0.01, None) == (1, 1)
