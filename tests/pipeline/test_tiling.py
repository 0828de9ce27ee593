"""Tiles: they cover everything, change nothing where receptive fields allow, and leave no seams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_models import small_bundle

from pipeline.config import ScheduleConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.resize import resize, resize_nearest_released
from pipeline.sampling import SeededNoise, ddim, dpm_solver
from pipeline.tiling import TiledDecoder, Tiling, blend_tiles, tiled_prediction, whole
from pipeline.windows import resize_window


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4]))
def test_tiles_cover_everything_with_positive_weight(tile: int, overlap: int, h: int, w: int, multiple: int) -> None:
    overlap = min(overlap, tile // 2)
    tiling = Tiling(tile * multiple, overlap * multiple, multiple)
    size = h * multiple, w * multiple
    whole_image = torch.randn(1, 2, *size)

    def cut(window: tuple[int, int, int, int]) -> torch.Tensor:
        y0, x0, y1, x1 = window
        assert all(edge % multiple == 0 for edge in window) and max(y1 - y0, x1 - x0) <= tile * multiple
        return whole_image[:, :, y0:y1, x0:x1]

    assert torch.allclose(blend_tiles(size, tiling, cut), whole_image, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_sampling_in_tiles_equals_sampling_whole(sampler: str) -> None:
    """A denoiser that sees one cell around each: the weightless margin of two cells hides the tiles' edges."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 3, 3, padding=1).double()
    condition = torch.randn(1, 3, 26, 31, dtype=torch.float64)
    schedule = Schedule(ScheduleConfig())

    def predict(z_t: torch.Tensor, t: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
        assert part is not None
        return torch.tanh(conv(torch.cat([z_t, part], dim=1))) * (1 + t[:, None, None, None] / 1000)

    results = []
    for tiling in (Tiling(16, 8), whole((26, 31))):
        noise = SeededNoise([3], (3, 26, 31))
        z, whole_predict = noise(dtype=torch.float64), tiled_prediction(predict, condition, tiling)
        with torch.no_grad():
            if sampler == "ddim":
                z = ddim(whole_predict, schedule, z, num_steps=5, eta=0.5, noise=noise)
            else:
                z = dpm_solver(whole_predict, schedule, z, num_steps=5)
        results.append(z)
    assert torch.allclose(results[0], results[1], rtol=1e-9, atol=1e-9)
    narrow = tiled_prediction(predict, condition, Tiling(16, 0))  # without overlap the edges do show
    whole_result = tiled_prediction(predict, condition, whole((26, 31)))
    t = torch.tensor([500])
    assert not torch.allclose(narrow(condition, t), whole_result(condition, t), atol=1e-3)


def _decoder() -> ImplicitDecoder:
    decoder = small_bundle().decoder
    assert decoder is not None
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=2.0 / parameter[0].numel() ** 0.5)
    return decoder


def test_decoding_one_tile_is_decoding() -> None:
    decoder, latent = _decoder(), torch.randn(1, 3, 9, 12)
    with torch.no_grad():
        expected = decoder(latent, (50, 60))
    tiled = TiledDecoder(decoder, latent, (50, 60), Tiling(12, 4))
    assert torch.allclose(tiled.window((7, 3, 40, 60)), expected[:, :, 7:40, 3:60], atol=1e-6)


def test_windows_of_a_tiled_decoding_fit_together() -> None:
    """However the output is cut, and with room for a single tile in the cache."""
    decoder, latent = _decoder(), torch.randn(1, 3, 20, 26)
    size = (90, 110)
    at_once = TiledDecoder(decoder, latent, size, Tiling(8, 4)).window((0, 0, *size))
    in_parts = TiledDecoder(decoder, latent, size, Tiling(8, 4), cache_bytes=1)
    for y0 in range(0, 90, 31):
        for x0 in range(0, 110, 43):
            y1, x1 = min(90, y0 + 31), min(110, x0 + 43)
            assert torch.allclose(in_parts.window((y0, x0, y1, x1)), at_once[:, :, y0:y1, x0:x1], atol=1e-5)
    assert len(in_parts._kept._kept) == 1


def test_overlapping_tiles_leave_no_seam() -> None:
    """Steps between neighbouring columns where tiles meet, against those elsewhere; D_phi's norms differ from tile to
    tile, so tiles put side by side do show."""
    decoder = _decoder()
    ramp = torch.linspace(-2, 2, 48)[None, None, None, :]
    latent = (ramp + 0.05 * torch.randn(1, 3, 16, 48, generator=torch.Generator().manual_seed(1))).contiguous()

    def seam(overlap: int) -> float:
        tiling = Tiling(16, overlap)
        image = TiledDecoder(decoder, latent, (64, 192), tiling).window((0, 0, 64, 192))
        steps = image.diff(dim=3).abs().mean(dim=(0, 1, 2))
        edges = [4 * edge for start, stop in tiling.spans(48) for edge in (start, stop) if 0 < edge < 48]
        return float(steps[[edge - 1 for edge in edges]].mean() / steps.median())

    assert seam(8) < 2.0
    assert seam(0) > 2 * seam(8)


@pytest.mark.parametrize("size", [(111, 200), (20, 31), (37, 53), (90, 30)])
def test_window_of_a_resized_picture(size: tuple[int, int]) -> None:
    image = torch.rand(2, 3, 37, 53)
    for window in ((0, 0, *size), (3, 5, 17, 29), (size[0] - 4, size[1] - 9, *size)):
        y0, x0, y1, x1 = window
        part = resize_window(image, size, window)
        assert torch.allclose(part, resize(image, size)[:, :, y0:y1, x0:x1], atol=2e-5)
        part = resize_window(image, size, window, "nearest_released")
        assert torch.equal(part, resize_nearest_released(image, size)[:, :, y0:y1, x0:x1])


def test_the_networks_never_see_more_than_a_tile(small_sr: LatentZoom) -> None:
    seen: list[tuple[int, int]] = []
    parts = [small_sr.autoencoder.encoder, small_sr.denoiser, small_sr.decoder.trunk]  # type: ignore[union-attr]
    factors = [small_sr.config.autoencoder.factor, 1, 1]
    hooks = [
        part.register_forward_hook(  # type: ignore[union-attr]
            lambda _, inputs, __, f=factor: seen.append((inputs[0].shape[-2] // f, inputs[0].shape[-1] // f))
        )
        for part, factor in zip(parts, factors)
    ]
    image = Image.effect_noise((41, 30), 60).convert("RGB")
    picture = small_sr.upscale(image, size=(150, 205), num_steps=2, tile=16)
    for hook in hooks:
        hook.remove()
    assert picture.size == (205, 150)
    latent_size = small_sr.high_resolution((30, 41))[0] // small_sr.config.autoencoder.factor
    assert latent_size > 16 and max(max(size) for size in seen) == 16
    assert len(seen) > 12


def test_a_picture_too_large_is_refused_before_it_is_encoded(small_sr: LatentZoom, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("pipeline.model.MAX_LATENT_CELLS", 100)
    monkeypatch.setattr(small_sr, "encode", lambda image: pytest.fail("it was encoded"))
    with pytest.raises(UserError, match="at most 100 cells"):
        small_sr.upscale(Image.new("RGB", (30, 30)), scale=2)


@pytest.mark.parametrize(("tile", "overlap", "multiple"), [(0, 0, 1), (8, 5, 1), (8, -1, 1), (10, 2, 4)])
def test_bad_tilings(tile: int, overlap: int, multiple: int) -> None:
    with pytest.raises(UserError):
        Tiling(tile, overlap, multiple)
