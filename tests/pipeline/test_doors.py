"""What comes out is right whatever went in: grey, rims, small outputs, overflow, and Python's mistakes."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from skimage import data as photographs

from pipeline.bleed import visible_colours
from pipeline.bundle import Bundle
from pipeline.errors import UserError
from pipeline.images import to_tensor, to_uint8
from pipeline.model import LatentZoom
from pipeline.reading import read_picture
from pipeline.resize import resize
from tests.pipeline.odd_files import ORIENTATION_6, exif_block, photo, saved
from tests.pipeline.small_direct import direct_bundle
from tests.pipeline.small_models import small_bundle


@pytest.fixture(scope="module")
def starter() -> LatentZoom:
    return LatentZoom.starter()


# --- the same reader in Python ----------------------------------------------------------------------------------------


def test_python_sees_what_a_viewer_sees(starter: LatentZoom, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    turned = photo(20, 30).transpose(Image.Transpose.ROTATE_90)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned.save(file, exif=exif_block([ORIENTATION_6, (0x213, 3, 1, b"\1\0")]), icc_profile=profile)
    made = [starter.upscale(door, 2) for door in (file, str(file), file.read_bytes(), Image.open(file))]
    made.append(starter.upscale(np.asarray(photo(20, 30)), 2))
    assert all(np.array_equal(np.asarray(m), np.asarray(made[0])) for m in made) and made[0].size == (60, 40)
    assert made[0].info["icc_profile"] == profile and made[0].getexif()[0x112] == 1 and "exif" not in made[-1].info


def test_16_bit_grey_is_not_white(starter: LatentZoom) -> None:
    deep = Image.fromarray(np.full((20, 20), 135 * 257, np.uint16))
    assert abs(np.asarray(starter.upscale(deep, 2)).mean() - 135) < 2


# --- grey -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "made"), [("L", "L"), ("LA", "LA"), ("1", "L"), ("RGB", "RGB"), ("RGBA", "RGBA")])
def test_as_many_channels_come_out_as_went_in(mode: str, made: str, tmp_path: Path) -> None:
    zoom = LatentZoom(direct_bundle())  # random weights: grey becomes colourful
    picture = read_picture(photo(12, 15).convert(mode))
    enlarged = zoom.upscale(picture, 2)
    assert enlarged.mode == made
    drawing = zoom.drawing(zoom.latent_of(picture), (24, 30), alpha=picture.opacity(), is_grey=picture.is_grey)
    for suffix in ("png", "tif"):
        drawing.write(tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as written:
            assert written.mode == made and np.array_equal(np.asarray(written), np.asarray(enlarged))


def test_grey_is_the_luma_of_what_is_drawn(starter: LatentZoom) -> None:
    grey = photo(30, 40).convert("L")
    expected = np.asarray(starter.upscale(grey.convert("RGB"), 2.5).convert("L")).astype(int)
    assert np.abs(np.asarray(starter.upscale(grey, 2.5)).astype(int) - expected).max() <= 1


# --- rims -------------------------------------------------------------------------------------------------------------


def disc(hidden: tuple[int, int, int], size: int = 48) -> np.ndarray:
    """A red disc with a soft rim; `hidden` lies where alpha is 0."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    alpha = np.clip((size / 3 - np.hypot(y, x)) / 3 + 0.5, 0, 1)
    picture = np.zeros((size, size, 4), np.uint8)
    picture[..., 3] = np.round(alpha * 255)
    picture[..., :3] = np.where(picture[..., 3:] > 0, (220, 30, 30), hidden)
    return picture


@pytest.mark.parametrize("scale", [0.6, 1.0, 2.0, 3.7])
def test_a_rim_has_the_colour_of_what_is_opaque(starter: LatentZoom, scale: float) -> None:
    made = [np.asarray(starter.upscale(disc(c), scale)).astype(int) for c in ((0, 0, 0), (0, 255, 0))]
    assert np.array_equal(made[0], made[1])  # nothing of the hidden colour shows
    seen = made[0][..., 3] > 0
    assert np.abs(made[0][..., :3][seen] - (220, 30, 30)).max() <= 12


def test_colours_continue_under_transparency() -> None:
    picture = np.zeros((9, 30, 4), np.uint8)
    picture[:, :10], picture[:, 20:] = (200, 0, 0, 255), (0, 0, 200, 255)
    filled = ((visible_colours(read_picture(picture))[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.allclose(filled[:, :10], (200, 0, 0), atol=1e-3) and np.allclose(filled[:, 20:], (0, 0, 200), atol=1e-3)
    assert np.all(filled[:, 11, 0] > 100) and np.all(filled[:, 18, 2] > 100) and filled[..., 1].max() < 1e-3
    assert torch.isfinite(visible_colours(read_picture(np.zeros((5, 7, 4), np.uint8)))).all()


# --- outputs with fewer pixels than cells -----------------------------------------------------------------------------


def zone_plate(size: int = 128) -> Image.Image:
    """Every frequency up to the finest: sin of a phase that grows with the square of the distance."""
    y, x = np.mgrid[:size, :size] - size / 2
    wave = np.sin(np.pi * (x**2 + y**2) / size)
    return Image.fromarray(np.round(127.5 + 100 * wave).astype(np.uint8))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.mark.parametrize(("scale", "least"), [(0.25, 30), (0.5, 30), (0.77, 25)])  # drawn as it comes: 13 to 15 dB
def test_a_zone_plate_gets_no_moire(starter: LatentZoom, scale: float, least: float) -> None:
    plate = zone_plate()
    made = np.asarray(starter.upscale(plate, scale))
    side = made.shape[0]
    low = to_uint8(resize(to_tensor(plate), (side, side)))[0, 0].numpy()
    assert psnr(made, low) > least
    # Frequencies that the output cannot hold, along either axis, are gone: nothing is left there but the mean.
    y, x = np.abs(np.mgrid[:side, :side] - (side - 1) / 2)
    beyond = np.maximum(y, x) / scale > 1.4 * scale * 64
    assert scale > 0.7 or made[beyond].std() < 10


@pytest.mark.parametrize("angle", [0.0, 0.3])
@pytest.mark.parametrize(("scale", "frequency"), [(0.25, 0.16), (0.5, 0.31), (0.5, 0.45), (0.77, 0.48)])
def test_frequencies_that_the_output_cannot_hold_are_gone(
    starter: LatentZoom, scale: float, frequency: float, angle: float
) -> None:
    """A grating of `frequency` cycles a pixel, beyond half a cycle of the output's pixels, leaves hardly more than an
    anti-aliased bicubic leaves of it; drawn pixel by pixel it comes back as another grating, nearly as strong."""
    y, x = np.mgrid[:96, :96]
    wave = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)))
    grating = Image.fromarray(np.round(127.5 + 100 * wave).astype(np.uint8))
    side = round(96 * scale)
    inner = slice(3, -3)
    low = to_uint8(resize(to_tensor(grating), (side, side)))[0, 0].numpy()[inner, inner].std()
    made = np.asarray(starter.upscale(grating, scale))[inner, inner].std()
    assert starter.decoder is not None
    drawn = starter.decoder(starter.latent_of(grating), (side, side)).mean(1)[0].numpy()[inner, inner].std() * 127.5
    assert made < 1.5 * low + 8 < drawn


@pytest.mark.parametrize(("look", "least"), [("faithful", 52), ("sharp", 48)])  # with a pixel a cell: 53.2 and 43.0 dB
def test_a_photograph_at_half_its_size_is_what_bicubic_makes_of_it(look: Any, least: float) -> None:
    picture = Image.fromarray(photographs.coffee()[100:292, 100:292])
    made = np.asarray(LatentZoom.starter(look).upscale(picture, 0.5))
    assert psnr(made, to_uint8(resize(to_tensor(picture), (96, 96)))[0].permute(1, 2, 0).numpy()) > least


@pytest.mark.parametrize("make", [direct_bundle, lambda: small_bundle("generation", "light")])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (5, 40), (8, 7)])
def test_small_outputs_are_reduced_window_by_window(make: Any, size: tuple[int, int]) -> None:
    zoom = LatentZoom(make())
    latent = torch.randn(1, 3, 8, 11, generator=torch.Generator().manual_seed(0))
    multiple = tuple(s * math.ceil(1.5 * c / s) if s < c else s for s, c in zip(size, (8, 11)))
    expected = resize(zoom.decoder(latent, multiple), size)  # type: ignore[misc]
    found = zoom.decode(latent, size)
    assert torch.allclose(found, expected, atol=1e-4)
    y, x = size[0] // 2, size[1] // 3
    window = zoom.decode(latent, size, (y, x, size[0], size[1]))
    assert torch.allclose(window, found[:, :, y:, x:], atol=1e-5)
    drawn = zoom.drawing(latent, size, tile=4).pixels((y, x, size[0], size[1]))
    whole = np.asarray(zoom.drawing(latent, size, tile=4).picture())
    assert np.array_equal(drawn, whole[y:, x:])
    if make is direct_bundle:
        assert np.abs(whole.astype(int) - to_uint8(found)[0].permute(1, 2, 0).numpy()).max() <= 1


def test_generating_small_is_generating_and_reducing() -> None:
    zoom = LatentZoom(small_bundle("generation"))
    small = zoom.generate(1, (4, 4), num_steps=2)[0]
    latent = zoom.sample_latents(seed=0, sampler="dpm++", num_steps=2)
    expected = to_uint8(resize(zoom.decode(latent, (12, 12)), (4, 4)))[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(small).astype(int) - expected).max() <= 1


# --- overflow ---------------------------------------------------------------------------------------------------------


def overflowing(task: str) -> Bundle:
    """A model whose D_phi overflows in half precision: one convolution before a group norm is scaled."""
    bundle = small_bundle(task)
    assert bundle.decoder is not None
    bundle.decoder.trunk.conv_in.weight.data *= 3e5
    return bundle


@pytest.mark.parametrize("door", ["generate", "upscale", "decode", "drawing", "file"])
def test_an_overflow_is_said_through_every_door(door: str, tmp_path: Path) -> None:
    zoom = LatentZoom(overflowing("generation"), dtype=torch.float16)
    latent = torch.randn(1, 3, 8, 8)
    doors: dict[str, Any] = {
        "generate": lambda: zoom.generate(1, (32, 32), num_steps=1),
        "upscale": lambda: zoom.upscale(photo(8, 8), 2),
        "decode": lambda: to_uint8(zoom.decode(latent, (32, 32))),
        "drawing": lambda: zoom.drawing(latent, (32, 32)).picture(),
        "file": lambda: zoom.drawing(latent, (32, 32)).write(tmp_path / "a.png"),
    }
    with pytest.raises(UserError, match="--dtype float32 or bfloat16"):
        doors[door]()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_value_without_meaning_becomes_a_pixel(value: float) -> None:
    image = torch.zeros(1, 3, 4, 4)
    image[0, 1, 2, 3] = value
    with pytest.raises(UserError, match="--dtype float32 or bfloat16"):
        to_uint8(image)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: z.upscale(photo(4, 4), scale="2"), "scale = '2' is not allowed; use a positive number"),
        (lambda z: z.upscale(photo(4, 4), scale=True), "scale = True is not allowed"),
        (lambda z: z.upscale(photo(4, 4), size=64), r"size 64 is not allowed; height and width"),
        (lambda z: z.upscale("no/such.png", 2), "no such file: no/such.png"),
        (lambda z: z.upscale(7, 2), "cannot read int as a picture"),
        (lambda z: LatentZoom.load("models:/tiny@champion"), "orchestration.registry.load"),
        (lambda z: LatentZoom.load(Path("no/such/bundle")), "no bundle at no/such/bundle"),
        (lambda z: LatentZoom.load(None), "None is no address of a bundle"),  # type: ignore[arg-type]
        (lambda z: LatentZoom.starter(dtype=torch.int8), "dtype = torch.int8 is not allowed"),
        (lambda z: LatentZoom.starter(dtype="half-baked"), "dtype = 'half-baked' is not allowed"),  # type: ignore[arg-type]
        (lambda z: z.upscale(photo(4, 4), 2, seed="x"), "seed = 'x' is not allowed"),
        (lambda z: z.upscale(photo(4, 4), 2, seed=1.5), "seed = 1.5 is not allowed"),
        (lambda z: z.upscale(photo(4, 4), 2, num_steps=-1), "num_steps = -1 is not allowed"),
        (lambda z: LatentZoom.starter(device="tpu"), "device 'tpu' is not there"),
        (lambda z: LatentZoom.starter(device="cpu:7"), "device 'cpu:7' is not there"),
    ],
)
def test_pythons_mistakes_are_one_line(starter: LatentZoom, call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        call(starter)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_said_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="device 'cuda' is not there .*; use cpu"):
        LatentZoom.load("no/such/bundle", device="cuda")


def test_numbers_of_other_kinds_are_numbers(starter: LatentZoom) -> None:
    assert starter.upscale(photo(4, 4), np.float32(2)).size == (8, 8)
    assert starter.upscale(photo(4, 4), 2).size == (8, 8)


def test_without_a_seed_one_is_drawn_and_said(caplog: pytest.LogCaptureFixture) -> None:
    zoom = LatentZoom(small_bundle("generation"))
    with caplog.at_level(logging.WARNING, "latentzoom"):
        first, second = zoom.generate(2, 16, seed=None, num_steps=2)
    seed = first.info["seed"]
    assert second.info["seed"] == seed + 1 and f"seed {seed} was drawn" in caplog.text and first.size == (16, 16)
    again = zoom.generate(2, 16, seed=seed, num_steps=2)[1]
    assert np.array_equal(np.asarray(again), np.asarray(second))
    assert saved(first, "PNG")
