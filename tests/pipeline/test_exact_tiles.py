"""D_phi without normalisation in tiles: the whole, exactly, whatever the tiles; with group norms that is not so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_direct import direct_bundle
from small_models import small_bundle

from pipeline.decoder import ImplicitDecoder
from pipeline.images import to_tensor
from pipeline.model import LatentZoom
from pipeline.tiling import TiledDecoder, Tiling

SIZE = (77, 61)  # of a latent of 29 × 23 cells: ×2.655 and ×2.652


def decoder_of(kind: str) -> ImplicitDecoder:
    decoder = direct_bundle(kind).decoder
    assert decoder is not None
    return decoder


def latent_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["liif", "light"])
@pytest.mark.parametrize("tile", [3, 8, 16, 22])
def test_tiles_of_a_norm_free_decoder_equal_the_whole(kind: str, tile: int) -> None:
    decoder, latent = decoder_of(kind), latent_of(2, 3, 29, 23)
    with torch.no_grad():
        expected = decoder(latent, SIZE)
    assert expected.std() > 0.05
    tiled = TiledDecoder(decoder, latent, SIZE, Tiling(tile, tile // 4))
    for window in ((0, 0, *SIZE), (31, 7, 77, 60)):
        y0, x0, y1, x1 = window
        assert float((tiled.window(window) - expected[:, :, y0:y1, x0:x1]).abs().max()) < 1e-5


def test_the_halo_is_as_wide_as_it_must_be_and_no_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: exact with it; with one cell less a difference far above rounding. Its width is what a single cell
    of the latent reaches."""
    decoder, latent = decoder_of("liif").double(), latent_of(1, 3, 64, 50).double()
    with torch.no_grad():
        expected = decoder(latent, (90, 70))
        one = torch.zeros(1, 3, 65, 65, dtype=torch.float64)
        base, one[:, :, 32, 32] = decoder.features(one), 1.0
        reached = (decoder.features(one) - base).abs().sum(dim=(0, 1)).nonzero()
    halo = decoder.trunk.halo
    assert halo is not None and (reached.amin(0).tolist(), reached.amax(0).tolist()) == (
        [32 - halo] * 2,
        [32 + halo] * 2,
    )

    def error() -> float:
        tiled = TiledDecoder(decoder, latent, (90, 70), Tiling(11, 2))
        parts = [
            (y, x, y + 10, x + 10) for y in range(0, 81, 5) for x in range(0, 61, 5)
        ]  # some reach a tile's last cell
        drawn = ((tiled.window(part) - expected[:, :, part[0] : part[2], part[1] : part[3]]) for part in parts)
        return max(float(difference.abs().max()) for difference in drawn)

    assert error() < 1e-12
    monkeypatch.setattr(decoder.trunk, "halo", halo - 1)
    assert error() > 1e-9


def test_windows_in_the_order_of_a_file_evaluate_each_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a factor whose windows cross tiles, with room for a row of tiles and three."""
    decoder, latent = decoder_of("light"), latent_of(1, 3, 40, 50)
    size, tiling = (132, 165), Tiling(10, 0)
    with torch.no_grad():
        num_bytes = 4 * decoder.features(latent[:, :, :14, :14]).numel()
    tiled = TiledDecoder(decoder, latent, size, tiling, cache_bytes=8 * num_bytes)
    evaluated = []
    features = decoder.features
    monkeypatch.setattr(decoder, "features", lambda part: evaluated.append(part.shape) or features(part))
    for y in range(0, 132, 24):
        for x in range(0, 165, 24):
            tiled.window((y, x, min(y + 24, 132), min(x + 24, 165)))
    assert len(evaluated) == len(tiling.windows((40, 50))) == 20


def test_windows_with_room_for_one_tile_equal_the_whole() -> None:
    decoder, latent = decoder_of("light"), latent_of(1, 3, 20, 26)
    in_parts = TiledDecoder(decoder, latent, (53, 70), Tiling(6, 2), cache_bytes=1)
    with torch.no_grad():
        expected = decoder(latent, (53, 70))
    for window in ((0, 0, 20, 70), (20, 0, 53, 33), (20, 33, 53, 70)):
        y0, x0, y1, x1 = window
        assert torch.allclose(in_parts.window(window), expected[:, :, y0:y1, x0:x1], atol=1e-5)
    assert len(in_parts._kept._kept) == 1


@pytest.mark.parametrize("tile", [2, 5, 12])
def test_upscaling_in_tiles_is_upscaling_the_whole(tile: int) -> None:
    model = LatentZoom(direct_bundle())
    noise = np.random.default_rng(0).integers(0, 256, (17, 22, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    latent = model.latent_of(image, tile=tile)
    assert torch.allclose(latent, to_tensor(image), atol=1e-6)  # the latent is the picture
    decoder, size = model.decoder, (56, 73)  # × 3.3
    assert decoder is not None
    tiled = TiledDecoder(decoder, latent, size, model.tiling(tile)).window((0, 0, *size))
    assert float((tiled - model.decode(to_tensor(image), size)).abs().max()) < 1e-5
    in_tiles, whole = (np.asarray(model.upscale(image, 3.3, tile=each)).astype(int) for each in (tile, 64))
    assert in_tiles.shape == (*size, 3)
    assert np.abs(in_tiles - whole).max() <= 1 and (in_tiles != whole).mean() < 1e-3  # a value may round either way


def test_group_norms_see_the_whole_so_tiles_differ() -> None:
    decoder = small_bundle().decoder
    assert decoder is not None and decoder.trunk.halo is None
    latent = latent_of(1, 3, 29, 23) * torch.linspace(0.1, 3, 23)
    with torch.no_grad():
        expected = decoder(latent, SIZE)
    tiled = TiledDecoder(decoder, latent, SIZE, Tiling(8, 2)).window((0, 0, *SIZE))
    assert float((tiled - expected).abs().max()) > 1e-3
