"""Damage in PNG, WebP, AVIF and packed TIFF that Pillow takes without a word."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from pipeline.reading import Unreadable, decode
from tests.pipeline.odd_files import ORIENTATION_6, chunk, exif_block, grey_png, photo, saved

LIMIT = 10**7


def with_data(png: bytes, raw: bytes) -> bytes:
    """A PNG with other pixel data."""
    return png[:33] + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlace", [0, 1])
def test_a_png_whose_data_end_in_order_but_early_is_damaged(interlace: int) -> None:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, interlace))
    png = b"\x89PNG\r\n\x1a\n" + head
    sizes = [(2, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16)] if interlace else [(16, 16)]
    rows = [b"\0" + b"\x55" * columns for num, columns in sizes for _ in range(num)]
    assert np.all(np.asarray(decode(with_data(png, b"".join(rows)), LIMIT).image) == 0x55)
    black = b"\0" * sum(map(len, rows))
    assert not np.asarray(decode(with_data(png, black), LIMIT).image).any()
    assert not np.asarray(decode(with_data(png, black + bytes(99)), LIMIT).image).any()
    for data in (b"".join(rows[: len(rows) // 2]), black[:-1]):
        with pytest.raises(Unreadable, match="damaged"):
            decode(with_data(png, data), LIMIT)


def test_of_the_transparent_value_the_low_bits_count() -> None:
    values = np.array([[0, 1], [1, 0]])
    data = grey_png(values, 1, 0)
    at = data.index(b"tRNS") + 4
    data = data[: at - 8] + chunk(b"tRNS", b"\xff\0") + data[at + 6 :]
    assert np.asarray(decode(data, LIMIT).shown())[..., 0].tolist() == [[255, 255], [255, 255]]
    assert np.asarray(decode(data, LIMIT).alpha).tolist() == [[0, 255], [255, 0]]


KINDS = {
    "lossless WebP": ("WEBP", {"lossless": True}),
    "AVIF": ("AVIF", {"quality": 80}),
    "PNG": ("PNG", {}),
    "deflate TIFF": ("TIFF", {"compression": "tiff_deflate"}),
    "lossy WebP": ("WEBP", {"quality": 90}),
    "JPEG TIFF": ("TIFF", {"compression": "jpeg"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_holes_and_tails_of_zeros_are_damage(kind: str) -> None:
    form, options = KINDS[kind]
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = saved(photo(200, 300), form, **options)
    decode(data, LIMIT)
    for at in (len(data) // 3, len(data) // 2, len(data) * 3 // 4):
        for hole in (400, len(data) - at):
            with pytest.raises(Unreadable, match="damaged|not_an_image"):
                decode(data[:at] + bytes(hole) + data[at + hole :], LIMIT)


@pytest.mark.parametrize("kind", KINDS)
def test_flat_pictures_and_zeros_in_notes_are_no_damage(kind: str) -> None:
    form, options = KINDS[kind]
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    corner = Image.new("RGB", (700, 500), "white")
    corner.paste(photo(), (10, 10))
    notes = exif_block([ORIENTATION_6]) + bytes(600)
    for picture in (Image.new("RGB", (700, 500), "white"), Image.new("RGB", (700, 500)), corner):
        more = {} if form == "TIFF" else {"exif": notes}
        assert decode(saved(picture, form, **options, **more), LIMIT).size[0] in (500, 700)


def test_lossy_webp_with_transparency_or_in_flat_areas_is_judged_by_what_is_left_over() -> None:
    clear = photo(200, 300).convert("RGBA")
    clear.putalpha(photo(200, 300).convert("L"))
    half = Image.new("RGB", (900, 600), "white")
    half.paste(photo(200, 300))
    for picture in (clear, half):
        for quality in (20, 90):
            data = saved(picture, "WEBP", quality=quality)
            decode(data, LIMIT)
            for name in (b"VP8 ", *([b"ALPH"] if picture is clear else [])):
                at = data.index(name) + 300
                with pytest.raises(Unreadable, match="damaged"):
                    decode(data[:at] + bytes(64) + data[at + 64 :], LIMIT)
