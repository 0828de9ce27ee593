"""Direct super-resolution: the autoencoder without weights, D_phi without norms, models that render a condition."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from small_direct import IDENTITY, direct_bundle, lively, norm_free
from small_models import small_bundle, small_config
from torch import nn

from pipeline.autoencoder import Autoencoder
from pipeline.bundle import Bundle, build_decoder, load_bundle, save_bundle
from pipeline.config import AutoencoderConfig, DecoderConfig, ModelConfig
from pipeline.decoder import FeatureDecoder, ImplicitDecoder
from pipeline.errors import UserError
from pipeline.images import to_tensor
from pipeline.initialise import initialise_decoder
from pipeline.model import LatentZoom
from pipeline.plain_trunk import PlainFeatureDecoder


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- the autoencoder without weights ----------------------------------------------------------------------------------


def test_identity_changes_nothing_and_has_no_weights() -> None:
    autoencoder = Autoencoder(IDENTITY)
    image = torch.rand(2, 3, 5, 7) * 2 - 1
    assert not autoencoder.state_dict() and IDENTITY.factor == 1 and IDENTITY.stored_channels == 3
    for result in (autoencoder.moments(image), autoencoder.encode(image), autoencoder.decode(image)):
        assert torch.equal(result, image)
    assert torch.equal(autoencoder.encode(image, torch.Generator()), image)  # there is no posterior to sample
    for shape in ((2, 1, 5, 7), (2, 3, 0, 7), (3, 5, 7)):
        with pytest.raises(UserError, match="cannot be encoded"):
            autoencoder.encode(torch.zeros(shape))


@pytest.mark.parametrize("kind", ["liif", "light"])
def test_a_bundle_without_weights_in_its_autoencoder_comes_back(kind: str, tmp_path: Path) -> None:
    bundle = direct_bundle(kind)
    save_bundle(str(tmp_path), bundle)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md", "autoencoder.safetensors", "config.json", "decoder.safetensors"
    ]  # fmt: skip
    loaded = load_bundle(str(tmp_path))
    assert loaded.config == bundle.config and loaded.denoiser is None
    assert loaded.autoencoder.identity() == bundle.autoencoder.identity() == Autoencoder(IDENTITY).identity()
    before, after = LatentZoom(bundle), LatentZoom(loaded)
    image = picture(9, 14)
    assert np.array_equal(np.asarray(before.upscale(image, 2.7)), np.asarray(after.upscale(image, 2.7)))
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["decoder"].update(norm="group", norm_groups=2)  # the same layers with norms: other weights
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"decoder.safetensors does not fit .* missing trunk\.\S*norm1"):
        load_bundle(str(tmp_path))


def test_bundles_from_before_there_was_a_choice_still_load(tmp_path: Path) -> None:
    save_bundle(str(tmp_path), small_bundle())
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("norm", "inputs"):
        del config["model"]["decoder"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_bundle(str(tmp_path)).config == small_config()


def model(**changes: Any) -> ModelConfig:
    return dataclasses.replace(direct_bundle().config, **changes)


def decoder(**changes: Any) -> DecoderConfig:
    return dataclasses.replace(norm_free(), **changes)


def rendering(task: str, inputs: str) -> ModelConfig:
    """A model with norms and a denoiser whose decoder renders `inputs`."""
    config = small_config(task)
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, inputs=inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AutoencoderConfig(kind="none"), "autoencoder.kind = 'none'"),  # type: ignore[arg-type]
        (lambda: dataclasses.replace(IDENTITY, latent_channels=4), "latent_channels = 4 .* 3 for"),
        (lambda: AutoencoderConfig(kind="identity"), r"width_mult = \(1, 2, 4\) .* one level"),
        (lambda: decoder(norm="batch"), "decoder.norm = 'batch'"),
        (lambda: decoder(inputs="picture"), "decoder.inputs = 'picture'"),
        (lambda: decoder(mid_attention=True), "decoder.norm = 'none' .* 'group' where blocks attend"),
        (lambda: decoder(attention_levels=(0,)), "decoder.norm = 'none' .* 'group' where blocks attend"),
        (lambda: model(task="upscale"), "task = 'upscale'"),
        (lambda: model(lr_size=8), "lr_size = 8"),
        (lambda: model(decoder=decoder(inputs="latent")), "decoder.inputs = 'latent' .* 'condition' for task 'direct'"),
        (lambda: model(task="generation", decoder=decoder(inputs="latent")), "autoencoder.kind = 'identity'"),
        (lambda: rendering("generation", "both"), "decoder.inputs = 'both' .* 'latent' for task 'generation'"),
        (lambda: rendering("sr", "condition"), "decoder.inputs = 'condition' .* 'latent' or 'both' for task 'sr'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(make: Any, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


# --- D_phi without norms ----------------------------------------------------------------------------------------------


def test_a_norm_free_decoder_has_no_norms_and_any_width() -> None:
    built = ImplicitDecoder(decoder(base_width=7, norm_groups=32), 3)
    assert not [part for part in built.modules() if isinstance(part, nn.GroupNorm)]
    assert not [name for name in built.state_dict() if "norm" in name]
    assert built(torch.zeros(2, 3, 4, 6), (5, 9)).shape == (2, 3, 5, 9)


@pytest.mark.parametrize("kind", ["liif", "light"])
def test_linear_start_without_norms_interpolates_bilinearly_and_all_of_it_learns(kind: str) -> None:
    torch.manual_seed(0)
    config = decoder(kind=kind, base_width=8, width_mult=(1,), mlp_width=24, light_width=24)
    built = ImplicitDecoder(config, 3)
    initialise_decoder(built)
    latent = torch.rand(2, 3, 8, 11) * 2 - 1
    expected = nn.functional.interpolate(latent, size=(21, 30), mode="bilinear", align_corners=False)
    torch.testing.assert_close(built(latent, (21, 30)), expected, atol=1e-4, rtol=0)
    optimizer = torch.optim.Adam(built.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (built(latent, (21, 30)) - expected.square()).abs().mean().backward()
        optimizer.step()
    still = [name for name, p in built.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("with_grad", [True, False])
def test_autocast_rounds_the_residual_blocks_only(with_grad: bool) -> None:
    """With branches that add nothing the picture is that of float32: neither the stream nor the light head is rounded.
    With branches that add something it is close, and of float32 still."""
    torch.manual_seed(0)
    built = ImplicitDecoder(decoder(base_width=8, width_mult=(1,), light_width=24), 3).eval().requires_grad_(False)
    initialise_decoder(built)
    latent, where = torch.rand(2, 3, 8, 11) * 2 - 1, (torch.arange(21), torch.arange(3, 30))
    for rounding in (1e-6, 3e-2):
        with torch.set_grad_enabled(with_grad):
            expected = built(latent, (21, 30))
            with torch.autocast("cpu", torch.bfloat16):
                found, lattice = built(latent, (21, 30)), built(latent, (21, 30), None, where)
        assert found.dtype == lattice.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=rounding, rtol=0)
        torch.testing.assert_close(lattice, found[..., 3:], atol=1e-5, rtol=0)
        lively(built)
    assert float((found - expected).abs().max()) > 1e-5


@pytest.mark.parametrize("with_grad", [True, False])
def test_it_is_the_decoder_with_norms_but_for_the_norms(with_grad: bool) -> None:
    """diffusers' blocks with nothing in the place of their norms, and the same weights under the same names."""
    config = decoder(base_width=8, width_mult=(1, 2), num_res_blocks=2)
    plain = PlainFeatureDecoder(config, 3)
    reference = FeatureDecoder(dataclasses.replace(config, norm="group", norm_groups=1), 3)
    for block in reference.modules():
        if isinstance(block, ResnetBlock2D):
            block.norm1, block.norm2 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    reference.load_state_dict(plain.state_dict(), strict=True)
    latent = torch.randn(2, 3, 7, 10)
    with torch.set_grad_enabled(with_grad):
        torch.testing.assert_close(plain(latent), reference(latent), atol=1e-6, rtol=1e-5)


# --- models that render a condition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9, 14), (1, 1), (2, 40)])
@pytest.mark.parametrize("scale", [0.6, 1.0, 3.3])
def test_a_direct_model_renders_the_picture_it_is_given(size: tuple[int, int], scale: float) -> None:
    zoom, image = LatentZoom(direct_bundle()), picture(*size)
    made = zoom.upscale(image, scale)
    target = tuple(max(1, round(side * scale)) for side in size)
    assert (made.height, made.width) == target
    by_hand = ((zoom.decode(to_tensor(image), target) + 1) * 127.5).round().clamp(0, 255)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(made).astype(int) - by_hand).max() <= 1


@pytest.mark.parametrize("mode", ["bicubic", "nearest"])
def test_a_direct_model_with_an_autoencoder_has_one_cell_a_pixel(mode: Any) -> None:
    kl = small_config().autoencoder
    bundle = direct_bundle(autoencoder=kl)
    bundle.config = dataclasses.replace(bundle.config, condition_resize=mode, scale_factor=1.7)
    zoom, image = LatentZoom(bundle), picture(6, 9)
    latent = zoom.latent_of(image)
    assert latent.shape == (1, 3, 6, 9)
    small = to_tensor(image)
    if mode == "nearest":
        enlarged = small.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    else:
        enlarged = nn.functional.interpolate(small, size=(24, 36), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(latent, zoom.encode(enlarged), atol=1e-4, rtol=0)


def test_what_a_direct_model_cannot_do_is_one_line() -> None:
    zoom = LatentZoom(direct_bundle())
    for call in (
        lambda: zoom.generate(1, (20, 30)),
        lambda: zoom.sample_latents(num=1, sampler="ddim"),
        lambda: zoom.denoise(torch.zeros(1, 3, 4, 4), torch.tensor([3])),
    ):
        with pytest.raises(UserError, match="direct super-resolution.*use upscale") as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no denoiser to compile"):
        zoom.compile()


def both_bundle() -> Bundle:
    bundle = small_bundle("sr")
    bundle.config = rendering("sr", "both")
    torch.manual_seed(0)
    bundle.decoder = lively(build_decoder(bundle.config))
    return bundle


def test_no_steps_render_the_condition_and_some_diffuse() -> None:
    zoom, image = LatentZoom(both_bundle()), picture(8, 11)
    assert zoom.denoiser is not None
    calls: list[int] = []
    zoom.denoiser.register_forward_hook(lambda *_: calls.append(1))
    latent = zoom.latent_of(image, num_steps=0)
    condition = zoom.condition(to_tensor(image))
    torch.testing.assert_close(latent * zoom.config.scale_factor, condition)
    made = [np.asarray(zoom.upscale(image, 2.3, num_steps=0, seed=seed)) for seed in (0, 5)]
    assert not calls and np.array_equal(*made)
    expected = zoom.drawing(condition / zoom.config.scale_factor, (18, 25)).picture()
    assert np.array_equal(made[0], np.asarray(expected))
    drawn = [np.asarray(zoom.upscale(image, 2.3, num_steps=2, seed=seed)) for seed in (0, 5)]
    assert len(calls) >= 4 and not np.array_equal(*drawn) and not np.array_equal(drawn[0], made[0])


def test_no_steps_need_no_denoiser() -> None:
    """After `decoder` a bundle has none yet."""
    bundle = both_bundle()
    bundle.denoiser = None
    zoom = LatentZoom(bundle)
    assert zoom.upscale(picture(8, 11), 2.3, num_steps=0).size == (25, 18)
    with pytest.raises(UserError, match="no denoiser yet"):
        zoom.upscale(picture(8, 11), 2.3, num_steps=1)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_no_steps_with_a_decoder_that_knows_no_conditions_is_one_line(small_sr: LatentZoom, num_steps: int) -> None:
    with pytest.raises(UserError, match=f"num_steps = {num_steps}") as error:
        small_sr.upscale(picture(8, 11), 2.3, num_steps=num_steps)
    assert "\n" not in str(error.value)
