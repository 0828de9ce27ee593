"""Resizing is anti-aliased, and pictures survive the way to tensors and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import relative_error

from pipeline.images import from_uint8, to_pictures, to_tensor, to_uint8
from pipeline.resize import resize, resize_nearest_released


def stripes(side: int) -> torch.Tensor:
    """One-pixel stripes: +1, -1, +1, ..."""
    return torch.ones(1, 3, side, side) * (1 - 2 * (torch.arange(side) % 2))


def test_reducing_averages_what_it_cannot_show() -> None:
    """Without anti-aliasing a third of one-pixel stripes would be full contrast again."""
    for mode in ("bicubic", "bilinear"):
        assert float(resize(stripes(63), (21, 21), mode)[..., 3:-3].abs().max()) < 0.2  # type: ignore[arg-type]
    aliased = torch.nn.functional.interpolate(stripes(63), size=(21, 21), mode="bicubic", align_corners=False)
    assert float(aliased[..., 3:-3].abs().max()) > 0.9


def test_reducing_by_a_whole_number_is_close_to_block_means() -> None:
    image = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(image, 9, stride=1, padding=4, count_include_pad=False)
    assert relative_error(resize(smooth, (12, 8)), torch.nn.functional.avg_pool2d(smooth, 4)) < 0.15


def test_same_size_is_the_image_itself_and_constants_stay() -> None:
    image = torch.randn(1, 3, 7, 9)
    assert resize(image, (7, 9)) is image
    assert torch.allclose(resize(torch.full((1, 3, 7, 9), 0.3), (20, 5)), torch.tensor(0.3))


@pytest.mark.parametrize(("side", "target"), [(8, 32), (3, 8), (5, 7)])
def test_released_nearest(side: int, target: int) -> None:
    """Pixel i of the target shows pixel floor(i · side / target)."""
    image = torch.randn(1, 3, side, side)
    index = torch.tensor([i * side // target for i in range(target)])
    assert torch.equal(resize_nearest_released(image, (target, target)), image[:, :, index][:, :, :, index])


def test_pictures_there_and_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (1, 3, 5, 7) and float(tensor.min()) >= -1 and float(tensor.max()) <= 1
    assert np.array_equal(np.asarray(to_pictures(tensor)[0]), pixels)


def test_bytes_are_rounded_and_clamped() -> None:
    values = torch.tensor([-3.0, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 0.999, 1.0, 9.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 0, 255, 255, 255]
    assert torch.equal(to_uint8(from_uint8(torch.arange(256, dtype=torch.uint8))), torch.arange(256, dtype=torch.uint8))


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert torch.equal(to_tensor(clear), torch.ones(1, 3, 2, 2))
