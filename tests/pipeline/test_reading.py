"""The one reader: every mode, layout and note of a file gives what a viewer shows, through whatever it is called."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from pipeline.errors import UserError
from pipeline.images import to_tensor
from pipeline.reading import Picture, Unreadable, decode, oriented_size, png, read_picture
from tests.pipeline.odd_files import (
    ORIENTATION_6,
    RESOLUTION_AS_TEXT,
    chunk,
    exif_block,
    grey_png,
    photo,
    saved,
    tiff,
    with_chunk,
)

LIMIT = 10**7


def shown(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, LIMIT).shown()).astype(int)


def grey() -> np.ndarray:
    return np.asarray(photo().convert("L")).astype(np.uint16)


# --- turning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tags", [[], [RESOLUTION_AS_TEXT]], ids=["plain", "a tag that cannot be rewritten"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_turned_whatever_else_its_exif_says(tags: list[Any], form: str) -> None:
    turned = photo().transpose(Image.Transpose.ROTATE_90)
    data = saved(turned, form, exif=exif_block([ORIENTATION_6, *tags]), quality=95)
    assert oriented_size(data, LIMIT) == (60, 90)
    assert np.abs(shown(data) - np.asarray(photo())).mean() < (0.1 if form == "PNG" else 5)
    kept = decode(data, LIMIT).exif
    assert kept is not None and Image.Exif().load(kept) is None


@pytest.mark.parametrize("entry", [(0x112, 1, 1, b"\6"), (0x112, 4, 1, b"\6\0\0\0"), (0x112, 3, 2, b"\6\0\6\0")])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_turn_may_be_written_as_another_kind_of_number(entry: tuple[int, int, int, bytes], form: str) -> None:
    data = saved(photo().transpose(Image.Transpose.ROTATE_90), form, exif=exif_block([entry]), quality=95)
    assert oriented_size(data, LIMIT) == decode(data, LIMIT).size == (60, 90)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif() -> None:
    turned = photo().transpose(Image.Transpose.ROTATE_90)
    data = saved(turned, "AVIF", exif=exif_block([ORIENTATION_6]), quality=95)
    assert oriented_size(data, LIMIT) == (60, 90) and np.abs(shown(data) - np.asarray(photo())).mean() < 4
    with pytest.raises(Unreadable, match="damaged"):
        decode(data[: len(data) // 2], LIMIT)


# --- TIFF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"rowsperstrip": 7}], ids=str)
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bit_planes(options: dict[str, Any], byteorder: str) -> None:
    planes = np.ascontiguousarray((np.asarray(photo()).astype(np.uint16) * 257).transpose(2, 0, 1))
    data = tiff(planes, photometric="rgb", planarconfig="separate", byteorder=byteorder, **options)
    assert np.array_equal(shown(data), np.asarray(photo()))


@pytest.mark.parametrize("num_bits", [8, 16])
def test_white_is_zero(num_bits: int) -> None:
    values = (65535 - grey() * 257) if num_bits == 16 else (255 - grey()).astype(np.uint8)
    picture = decode(tiff(values, photometric="miniswhite"), LIMIT)
    assert picture.is_grey and np.array_equal(np.asarray(picture.image), grey())


def test_an_unusual_layout_is_turned_too() -> None:
    data = tiff(65535 - grey() * 257, photometric="miniswhite", extratags=[(274, 3, 1, 3, True)])
    assert np.array_equal(np.asarray(decode(data, LIMIT).image), grey()[::-1, ::-1])


def test_16_bit_alpha_that_is_multiplied_in() -> None:
    colour = np.asarray(photo()).astype(np.int64) * 257
    alpha = np.random.default_rng(0).integers(20000, 65536, (60, 90, 1))
    planes = np.concatenate([colour * alpha // 65535, alpha], -1).astype(np.uint16).transpose(2, 0, 1)
    options: dict[str, Any] = {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["assocalpha"]}
    picture = decode(tiff(np.ascontiguousarray(planes), **options), LIMIT)
    assert np.abs(np.asarray(picture.image).astype(int) - np.asarray(photo())).max() <= 1
    assert picture.alpha is not None and np.abs(np.asarray(picture.alpha) - alpha[..., 0] / 257).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (np.zeros((9, 9), np.int16), {}, "signed pixels have no agreed range .TIFF, 16-bit signed minisblack"),
        (np.zeros((9, 9), np.float32), {}, "floating-point pixels .* 32-bit float minisblack"),
        (np.zeros((9, 9), np.uint32), {"photometric": "miniswhite"}, "32-bit miniswhite"),
    ],
)
def test_layouts_without_a_meaning_are_refused_by_name(values: np.ndarray, options: dict[str, Any], words: str) -> None:
    with pytest.raises(Unreadable, match=words) as error:
        decode(tiff(values, **({"photometric": "minisblack"} | options)), LIMIT)
    assert error.value.reason == "unsupported"


def test_a_cut_tiff_of_an_unusual_layout_is_damaged() -> None:
    with pytest.raises(Unreadable) as error:
        decode(tiff(65535 - grey() * 257, photometric="miniswhite")[:-3000], LIMIT)
    assert error.value.reason == "damaged"


# --- PNG --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_grey(depth: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**depth, (9, 13))
    clear = int(values[4, 5])
    picture = decode(grey_png(values, depth, clear), LIMIT)
    assert picture.is_grey and picture.alpha is not None
    assert np.array_equal(np.asarray(picture.alpha), np.where(values == clear, 0, 255))
    assert np.abs(np.asarray(picture.image) - values * 255 / (2**depth - 1)).max() <= 0.5
    assert decode(grey_png(values, depth), LIMIT).alpha is None


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 1_200_000)),
        chunk(b"tEXt", b"parameters\0" + b"x" * 2_000_000),
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 1_200_000)),
        chunk(b"tEXt", b"Title\0hello", is_good=False),
        chunk(b"tIME", b"broken"),
        chunk(b"iCCP", b"icc\0\0nonsense"),
        chunk(b"eXIf", b"nonsense"),
    ],
    ids=["long zTXt", "long tEXt", "long iTXt", "checksum of a text", "short tIME", "broken iCCP", "broken eXIf"],
)
@pytest.mark.parametrize("is_deep", [False, True])
def test_notes_do_not_cost_the_picture(extra: bytes, is_deep: bool) -> None:
    data = grey_png(grey() * 257, 16) if is_deep else saved(photo(), "PNG")
    expected = np.repeat(grey()[..., None], 3, -1) if is_deep else np.asarray(photo())
    assert np.array_equal(shown(with_chunk(data, extra)), expected)


def test_a_profile_of_megabytes_is_used() -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()) + bytes(2_000_000)
    profile[:4] = len(profile).to_bytes(4, "big")
    data = with_chunk(saved(photo(), "PNG"), chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(profile))))
    assert decode(data, LIMIT).icc == bytes(profile)


def test_broken_pixels_stay_broken() -> None:
    data = bytearray(saved(photo(), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(Unreadable, match="damaged"):
        decode(bytes(data), LIMIT)


def test_exif_in_a_text_still_turns() -> None:
    block = exif_block([ORIENTATION_6]).removeprefix(b"Exif\0\0")
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    turned = photo().transpose(Image.Transpose.ROTATE_90)
    data = with_chunk(saved(turned, "PNG"), chunk(b"tEXt", b"Raw profile type exif\0" + text))
    assert np.array_equal(shown(data), np.asarray(photo()))
    image = Image.open(io.BytesIO(data))
    image.load()
    for _ in range(2):  # the caller's image stays as it is
        assert np.array_equal(np.asarray(read_picture(image).image), np.asarray(photo()))


# --- grey, palettes, profiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16"])
def test_grey_is_one_channel(mode: str) -> None:
    image = photo().convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    picture = decode(saved(image if mode == "I;16" else image.convert(mode), "PNG"), LIMIT)
    assert picture.is_grey and (picture.alpha is not None) == (mode == "LA")
    if mode != "1":
        assert np.array_equal(np.asarray(picture.image), grey())


def test_16_bit_grey_with_alpha_is_grey() -> None:
    values = np.stack([grey(), grey()[::-1]], -1).astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 4, 0, 0, 0)
    data = png.SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    for source in (data, Image.open(io.BytesIO(data))):
        picture = read_picture(source)
        assert picture.is_grey and np.array_equal(np.asarray(picture.image), grey())
        assert np.array_equal(np.asarray(picture.alpha), grey()[::-1])


def test_colours_stay_colours() -> None:
    for mode in ("P", "RGB", "CMYK", "YCbCr"):
        assert not decode(saved(photo().convert(mode), "TIFF"), LIMIT).is_grey


def test_a_grey_pictures_rgb_profile_is_dropped_and_an_rgb_pictures_kept() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(saved(photo(), "PNG", icc_profile=profile), LIMIT).icc == profile
    assert decode(saved(photo().convert("L"), "JPEG", icc_profile=profile), LIMIT).icc is None


# --- doors ------------------------------------------------------------------------------------------------------------


def test_every_door_reads_the_same(tmp_path: Path) -> None:
    turned = photo().transpose(Image.Transpose.ROTATE_90)
    file = tmp_path / "a.png"
    turned.save(file, exif=exif_block([ORIENTATION_6]))
    expected = np.asarray(photo())
    loaded = Image.open(file)
    loaded.load()
    doors = [file, str(file), file.read_bytes(), Image.open(file), loaded, photo(), np.asarray(photo())]
    for door in (*doors, read_picture(file)):
        picture = read_picture(door)
        assert np.array_equal(np.asarray(picture.image), expected), type(door)
    assert float(to_tensor(file).sub(to_tensor(photo())).abs().max()) == 0


def test_a_picture_that_pillow_opened_is_read_with_the_same_care() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 9, 3), dtype=np.uint16)
    data = tiff(values, photometric="rgb")
    rounded = np.floor(values.astype(float) * 255 / 65535 + 0.5)
    assert np.array_equal(np.asarray(read_picture(Image.open(io.BytesIO(data))).image), rounded)
    deep = Image.fromarray(np.full((5, 5), 135 * 257, np.uint16))
    assert np.asarray(read_picture(deep).image).mean() == 135


def test_open_files_and_buffers_are_read_as_files(tmp_path: Path) -> None:
    data = saved(photo(), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    with open(tmp_path / "a.png", "rb") as file:
        file.read(10)
        for source in (file, io.BytesIO(data), bytearray(data), memoryview(data)):
            assert np.array_equal(np.asarray(read_picture(source).image), np.asarray(photo()))
    with open(tmp_path / "a.png") as text, pytest.raises(UserError, match="cannot read"):
        read_picture(text)


def test_arrays() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    assert read_picture(array[..., 0]).is_grey and read_picture(array[..., :1]).is_grey
    assert read_picture(array[..., :2]).alpha is not None and not read_picture(array[..., :3]).is_grey
    assert np.array_equal(np.asarray(read_picture(array).alpha), array[..., 3])


@pytest.mark.parametrize(
    ("door", "words"),
    [
        (np.zeros((5, 5, 3), np.float32), r"array of float32 \(5, 5, 3\).*array of uint8"),
        (np.zeros((5, 5, 7), np.uint8), r"array of uint8 \(5, 5, 7\)"),
        (7, "cannot read int as a picture"),
        (None, "cannot read NoneType as a picture"),
        ("no/such/file.png", "no such file"),
        (Path("no/such/file.png"), "cannot read no/such/file.png"),
        (b"<!DOCTYPE html><html>", "not_an_image: a web page, not the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not_an_image: a Git LFS pointer"),
        (b"<?xml version='1.0'?><svg/>", "not_an_image: an SVG drawing"),
        (b"text", "cannot be read as a picture: not_an_image"),
        (Image.new("F", (4, 4)), "floating-point pixels"),
    ],
)
def test_what_is_no_picture_is_said(door: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_picture(door)


def test_a_picture_is_read_once() -> None:
    picture = Picture(photo())
    assert read_picture(picture) is picture
