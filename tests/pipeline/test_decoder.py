"""The implicit decoder: equal to the plain evaluation, to itself in windows and chunks, and in half precision."""

from __future__ import annotations

import pytest
import torch
from small_models import relative_error, small_bundle

from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from pipeline.geometry import MAX_SIDE
from pipeline.light import LightHead
from pipeline.liif import LiifHead
from pipeline.reference import query_reference, render_light_reference, render_reference

KINDS = ["liif", "light"]


def decoder_of(kind: str) -> ImplicitDecoder:
    decoder = small_bundle(decoder=kind).decoder
    assert decoder is not None
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.head.parameters():  # large enough that a wrong coordinate shows
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 2) ** 0.5
    return decoder


def latent_of(h: int, w: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("cells", "size"),
    [
        *(((8, 8), (32, 32)), ((8, 8), (53, 53)), ((5, 7), (40, 24)), ((7, 5), (41, 99)), ((6, 9), (4, 300))),
        *(((1, 1), (6, 4)), ((1, 6), (8, 36)), ((16, 16), (10, 12))),
    ],
)
def test_liif_equals_the_plain_evaluation(cells: tuple[int, int], size: tuple[int, int]) -> None:
    """Non-square latents and outputs, a scale of its own per axis, enlarging and reducing."""
    decoder = decoder_of("liif")
    assert isinstance(decoder.head, LiifHead)
    features = decoder.features(latent_of(*cells))
    expected = render_reference(decoder.head, features, size)
    assert float((decoder.render(features, size) - expected).abs().max()) < 1e-5
    assert float(expected.std()) > 0.05


def test_liif_equals_the_plain_evaluation_in_float64() -> None:
    """In float64 the only difference left is the reference's own 1e-9 in the areas."""
    decoder = decoder_of("liif").double()
    assert isinstance(decoder.head, LiifHead)
    features = decoder.features(latent_of(5, 8).double())
    expected = render_reference(decoder.head, features, (46, 90))
    assert float((decoder.render(features, (46, 90)) - expected).abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("cells", "size"),
    [((5, 8), (46, 90)), ((7, 5), (41, 99)), ((6, 9), (4, 300)), ((1, 6), (8, 36)), ((16, 16), (10, 12))],
)
def test_light_equals_its_formula(cells: tuple[int, int], size: tuple[int, int]) -> None:
    """Against corner by corner in float64: all blocks of grid, the CPU path in float32, and single pixels. (The
    reference adds 1e-9 to its areas, and fields are as large as 13.)"""
    decoder = decoder_of("light")
    head = decoder.head
    assert isinstance(head, LightHead) and len(head.hidden) == head.depth - 1 > 0
    features = decoder.features(latent_of(*cells))
    with torch.no_grad():
        fast = decoder.render(features, size)
        decoder = decoder.double()
        expected = render_light_reference(head, features.double(), size)
        exact = decoder.render(features.double(), size, chunk=37)
        index_y, index_x = torch.randint(0, size[0], (2, 30)), torch.randint(0, size[1], (2, 30))
        pixels = decoder.query(features.double(), size, index_y, index_x)
    assert float(expected.std()) > 0.05
    assert float((exact - expected).abs().max()) < 1e-6
    assert float((fast - expected).abs().max()) < 1e-5
    for b in range(2):
        assert torch.allclose(pixels[b], expected[b][:, index_y[b], index_x[b]], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_image_at_the_latent_s_own_size(kind: str) -> None:
    """Every pixel lies on a cell's centre: the whole weight is on that cell, edges included."""
    decoder = decoder_of(kind)
    latent = latent_of(6, 4)
    table = decoder.prepare(decoder.features(latent))
    image = decoder.render_table(table, (6, 4))
    for y, x in ((0, 0), (2, 1), (5, 3), (5, 0)):
        alone = decoder.render_table(table[:, y : y + 1, x : x + 1], (1, 1))
        assert torch.allclose(image[:, :, y : y + 1, x : x + 1], alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [(0, 0, 1, 1), (3, 11, 20, 57), (36, 0, 37, 61), (0, 60, 37, 61)])
def test_window_equals_the_crop_of_the_whole(kind: str, window: tuple[int, int, int, int]) -> None:
    decoder = decoder_of(kind)
    features = decoder.features(latent_of(5, 7))
    y0, x0, y1, x1 = window
    whole = decoder.render(features, (37, 61))
    assert torch.allclose(decoder.render(features, (37, 61), window), whole[:, :, y0:y1, x0:x1], atol=1e-6)


@pytest.mark.parametrize("corner", [(0, 0), (MAX_SIDE - 3, MAX_SIDE - 5), (MAX_SIDE // 2 - 1, MAX_SIDE // 3)])
def test_window_of_a_gigantic_output(corner: tuple[int, int]) -> None:
    """2^40 pixels; the window equals the plain evaluation, in float64, of just its pixels."""
    decoder = decoder_of("liif")
    assert isinstance(decoder.head, LiifHead)
    features = decoder.features(latent_of(8, 9, batch=1))
    y, x = corner
    tile = decoder.render(features, (MAX_SIDE, MAX_SIDE), (y, x, y + 3, x + 5))
    index = torch.stack(torch.meshgrid(torch.arange(y, y + 3), torch.arange(x, x + 5), indexing="ij"), dim=-1)
    coord = (2 * index.reshape(-1, 2).double() + 1) / MAX_SIDE - 1
    expected = query_reference(decoder.head.double(), features.double(), coord, (MAX_SIDE, MAX_SIDE))
    assert torch.allclose(tile.double(), expected.transpose(1, 2).reshape(1, 3, 3, 5), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, 100_000])
def test_chunks_do_not_change_the_image(kind: str, chunk: int) -> None:
    decoder = decoder_of(kind)
    features = decoder.features(latent_of(3, 4))
    expected = decoder.render(features, (13, 10), chunk=130)
    assert torch.allclose(decoder.render(features, (13, 10), chunk=chunk), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_queries_equal_the_pixels_of_the_whole(kind: str) -> None:
    decoder = decoder_of(kind)
    features = decoder.features(latent_of(5, 7))
    image = decoder.render(features, (33, 50))
    index_y, index_x = torch.randint(0, 33, (2, 40)), torch.randint(0, 50, (2, 40))
    pixels = decoder.query(features, (33, 50), index_y, index_x)
    assert pixels.shape == (2, 3, 40)
    for b in range(2):
        assert torch.allclose(pixels[b], image[b][:, index_y[b], index_x[b]], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_are_independent(kind: str) -> None:
    decoder = decoder_of(kind)
    latent = latent_of(5, 7, batch=3)
    together = decoder(latent, (20, 30))
    for b in range(3):
        assert torch.allclose(decoder(latent[b : b + 1], (20, 30))[0], together[b], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Errors stay those of rounding, at an ordinary size and at the far end of a gigantic one."""
    decoder = decoder_of(kind)
    features = decoder.features(latent_of(8, 8)).to(dtype)
    exact = decoder_of(kind)
    half = decoder.to(dtype)
    for module in (half.head, exact.head):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    allowed = 0.03 if dtype == torch.bfloat16 else 0.004
    for size, window in (
        ((40, 56), None),
        ((MAX_SIDE, MAX_SIDE), (MAX_SIDE - 20, MAX_SIDE // 2, MAX_SIDE, MAX_SIDE // 2 + 9)),
    ):
        image = half.render(features, size, window)
        assert image.dtype == dtype
        assert relative_error(image, exact.render(features.float(), size, window)) < allowed


@pytest.mark.parametrize("kind", KINDS)
def test_scale_consistency_of_a_constant_cell_size(kind: str) -> None:
    """The same latent at two sizes shows the same picture: block means of the larger are close to the smaller."""
    decoder = decoder_of(kind)
    features = decoder.features(latent_of(4, 4))
    small, large = decoder.render(features, (24, 24)), decoder.render(features, (72, 72))
    means = torch.nn.functional.avg_pool2d(large, 3)
    assert relative_error(means, small) < 0.25


def test_bad_input() -> None:
    decoder = decoder_of("liif")
    features = decoder.features(latent_of(4, 4))
    for latent in (latent_of(4, 4)[:, :2], latent_of(4, 4)[0], torch.zeros(1, 3, 0, 4)):
        with pytest.raises(UserError, match=r"expected \(B, 3, h, w\)"):
            decoder.features(latent)
    for value in (float("nan"), float("inf")):
        with torch.no_grad(), pytest.raises(UserError, match="NaN or infinite"):
            decoder.features(torch.full((1, 3, 4, 4), value))
    for size in ((0, 4), (4, -1), (MAX_SIDE + 1, 4)):
        with pytest.raises(UserError, match="size"):
            decoder.render(features, size)
        with pytest.raises(UserError, match="size"):
            decoder.query(features, size, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64))
    index = torch.zeros(2, 1, dtype=torch.int64)
    for wrong in (index - 1, index + 10):
        with pytest.raises(UserError, match=r"index_y holds -?\d+\.\.-?\d+; an output of 10 pixels has indices 0\.\.9"):
            decoder.query(features, (10, 20), wrong, index)
    with pytest.raises(UserError, match="index_x holds 20"):
        decoder.query(features, (10, 20), index, index + 20)
    with pytest.raises(UserError, match="whole numbers"):
        decoder.query(features, (10, 20), index, index.float())
    with pytest.raises(UserError, match="window"):
        decoder.render(features, (10, 10), (0, 0, 11, 10))
    for chunk in (0, -5):
        with pytest.raises(UserError, match="chunk"):
            decoder.render(features, (10, 10), chunk=chunk)
