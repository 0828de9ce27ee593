"""What direct super-resolution is shown: scales, regions and pixels, drawn by seed and step alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from direct_settings import DIRECT, WITH_ENCODER
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.autoencoder import Autoencoder
from pipeline.errors import UserError
from pipeline.images import from_uint8, to_uint8
from pipeline.resize import resize
from training.config import AutoencoderStage, DecoderStage, override
from training.micro_batch import MicroBatch
from training.noise import Draws
from training.pairs import cached_pairs, direct_pairs, latent_pairs
from training.presets import debug
from training.zoom import draw_zoom, largest_zoom, smallest_zoom


def stage(**changes: object) -> DecoderStage:
    return dataclasses.replace(DecoderStage(input_cells=12), **changes)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 10**6), st.integers(8, 80), st.integers(1, 60), st.floats(1, 6), st.floats(0, 6), st.integers(0, 50),
    st.booleans(),
)  # fmt: skip
def test_regions_lie_in_the_image_and_have_the_drawn_scale(
    step: int, side: int, cells: int, low: float, more: float, crop: int, scattered: bool
) -> None:
    config = stage(min_scale=low, max_scale=low + more, input_cells=cells, crop=crop, scattered=scattered)
    zoom = draw_zoom(config, side, step)
    assert 1 <= zoom.cells <= min(cells, side) and zoom.cells <= zoom.size[0] <= side
    assert 0 <= zoom.top <= side - zoom.size[0] and 0 <= zoom.left <= side - zoom.size[0]
    assert zoom.size[0] >= min(side, math.floor(zoom.cells * low)) and zoom.size[0] <= math.ceil(
        zoom.cells * (low + more)
    )
    for index in (zoom.rows, zoom.cols):
        assert len(index) == (min(crop, zoom.size[0]) if crop else zoom.size[0])
        assert bool((index.diff() > 0).all()) and int(index[0]) >= 0 and int(index[-1]) < zoom.size[0]
        assert scattered or bool((index.diff() == 1).all())
    largest = largest_zoom(config, side)
    assert zoom.cells <= largest[0] and smallest_zoom(config, side) <= len(zoom.rows) <= largest[2]


def test_scales_are_log_uniform_and_every_place_and_turn_comes_up() -> None:
    config = stage(min_scale=1.0, max_scale=4.0, input_cells=40, turns=True)
    zooms = [draw_zoom(config, 256, step) for step in range(800)]
    scales = torch.tensor([zoom.size[0] / zoom.cells for zoom in zooms])
    assert abs(float((scales < 2).float().mean()) - 0.5) < 0.06  # half of the octaves
    assert float(scales.min()) < 1.05 and float(scales.max()) > 3.9
    tops = [zoom.top / (256 - zoom.size[0]) for zoom in zooms]
    assert min(tops) < 0.02 and max(tops) > 0.98
    turns = [2 * zoom.upside_down + zoom.turned for zoom in zooms]
    assert all(140 < turns.count(turn) < 260 for turn in range(4))
    plain = [draw_zoom(stage(turns=False), 256, step) for step in range(40)]
    assert not any(zoom.upside_down or zoom.turned for zoom in plain)


def test_a_draw_belongs_to_seed_and_step() -> None:
    one, same, other, later = (draw_zoom(stage(seed=s), 64, step) for s, step in ((1, 3), (1, 3), (2, 3), (1, 4)))
    key = [(zoom.size[0], zoom.top, zoom.left) for zoom in (one, same, other, later)]
    assert key[0] == key[1] and len(set(key)) == 3


def test_scattered_pixels_come_from_the_whole_region() -> None:
    config = stage(min_scale=4.0, max_scale=4.0, input_cells=12, crop=6, scattered=True)
    seen = torch.cat([draw_zoom(config, 64, step).rows for step in range(200)]).bincount(minlength=48)
    assert len(seen) == 48 and int(seen.min()) > 5


@pytest.mark.parametrize("turned", [False, True])
def test_truth_and_input_are_of_the_same_region(turned: bool) -> None:
    """By hand: cut, turn, shrink."""
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    zoom = dataclasses.replace(draw_zoom(stage(crop=9), 64, 5), upside_down=True, turned=turned)
    by_hand = image[:, :, zoom.top : zoom.top + zoom.size[0], zoom.left : zoom.left + zoom.size[0]].flip(2)
    by_hand = by_hand.transpose(2, 3) if turned else by_hand
    region = zoom.region(image)
    assert torch.equal(region, by_hand)
    y, x = int(zoom.rows[4]), int(zoom.cols[2])
    assert torch.equal(zoom.truth(region)[:, :, 4, 2], region[:, :, y, x])
    low = zoom.low_resolution(region)
    expected = torch.nn.functional.interpolate(region, (zoom.cells,) * 2, mode="bicubic", antialias=True)
    levels = (low + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-3)  # 8 bits
    assert float((low - expected.clamp(-1, 1)).abs().max()) <= 0.5 / 127.5 + 1e-5


def micro(latents: bool = True) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    stored, condition = (torch.randn(2, 6, side, side, generator=generator) for side in (8, 11))
    return MicroBatch(range(2), pixels, stored if latents else None, condition)


def test_direct_pairs_are_what_upscaling_will_see() -> None:
    """With an autoencoder of f = 4: the drawn input enlarged four times, encoded; the truth the region's own pixels."""
    preset = override(debug(), WITH_ENCODER)
    torch.manual_seed(0)
    autoencoder, batch = Autoencoder(preset.model.autoencoder).eval(), micro()
    pair = direct_pairs(preset.decoder, preset.model, autoencoder, 7)(batch)
    zoom = draw_zoom(preset.decoder, 32, 7)
    assert batch.pixels is not None
    region = zoom.region(batch.pixels)
    small = from_uint8(to_uint8(resize(region, (zoom.cells, zoom.cells))))
    enlarged = torch.nn.functional.interpolate(small, scale_factor=4, mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(pair.latent, autoencoder.encode(enlarged), atol=1e-4, rtol=0)
    assert pair.latent.shape == (2, 3, zoom.cells, zoom.cells) and not pair.latent.requires_grad
    size, window, lattice = pair.where
    assert size == (zoom.size[0], zoom.size[0]) and window is None
    assert torch.equal(pair.truth, region[:, :, lattice[0][:, None], lattice[1]])


def test_a_decoder_for_both_sees_conditions_at_every_second_step() -> None:
    model = dataclasses.replace(debug().model, task="sr", lr_size=8)
    both = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, inputs="both"))
    batch = micro()
    assert batch.latents is not None and batch.condition is not None
    for shown, step, kind in ((both, 1, batch.latents), (both, 2, batch.condition), (model, 2, batch.latents)):
        pair = latent_pairs(debug().decoder, shown, step)(batch)
        assert torch.equal(pair.latent, kind[:, :3])  # the mean


def test_latent_noise_is_in_units_of_the_latents_own_deviation() -> None:
    config, batch = dataclasses.replace(debug().decoder, latent_noise=0.5), micro()
    assert batch.latents is not None
    model = dataclasses.replace(debug().model, scale_factor=4.0)
    difference = latent_pairs(config, model, 3)(batch).latent - batch.latents[:, :3]
    expected = Draws(range(2), "cpu", 0, "latent", 3).normal((3, 8, 8))
    torch.testing.assert_close(difference, 0.5 / 4.0 * expected, atol=1e-6, rtol=1e-5)


def test_kl_latents_are_drawn_from_their_distribution_where_asked() -> None:
    """As the released code trains the implicit decoder over a frozen encoder; another sample at each step."""
    model, batch = debug().model, micro()
    assert batch.latents is not None
    batch.latents[:, :3], batch.latents[:, 3:] = 0.5, 2 * math.log(0.3)  # mean and log-variance
    config = dataclasses.replace(debug().decoder, sample_latents=True)
    drawn = torch.stack([latent_pairs(config, model, step)(batch).latent for step in range(40)])
    assert torch.equal(drawn[3], latent_pairs(config, model, 3)(batch).latent)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02) and float(drawn.std()) == pytest.approx(0.3, rel=0.05)


def test_cached_pairs_go_from_the_input_s_size_to_the_image_s() -> None:
    preset = override(debug(), WITH_ENCODER)
    sides = [cached_pairs(preset.decoder, preset.model, step)(micro(False)).where[0][0] for step in range(200)]
    assert min(sides) == 11 and max(sides) == 32
    pair = cached_pairs(preset.decoder, preset.model, 4)(batch := micro(False))
    assert batch.condition is not None and batch.pixels is not None
    assert torch.equal(pair.latent, batch.condition[:, :3])
    (side, _), (y0, x0, y1, x1) = pair.where
    assert torch.equal(pair.truth, resize(batch.pixels, (side, side))[:, :, y0:y1, x0:x1])


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("decoder.min_scale=0.5", "min_scale = 0.5"),
        ("decoder.max_scale=0.9", "max_scale = 0.9"),
        ("decoder.input_cells=0", "input_cells = 0"),
        ("decoder.conditions=made", "conditions"),
        ("decoder.start=blank", "start"),
        ("decoder.perceptual_weight=-1", "perceptual_weight = -1"),
    ],
)
def test_bad_settings_are_one_line(setting: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        override(debug(), [*DIRECT, setting])
    assert "\n" not in str(error.value)


def test_terms_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match="scattered = True .* compares windows"):
        DecoderStage(perceptual_weight=0.1, lpips_weights="random", scattered=True)
    for name in ("perceptual_weight", "adversarial_weight"):
        with pytest.raises(UserError, match=f"{name} = 0.1 .* implicit decoder"):
            AutoencoderStage(decoder="implicit", lpips_weights="random", **{name: 0.1})  # type: ignore[arg-type]
