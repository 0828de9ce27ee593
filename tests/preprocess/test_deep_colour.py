"""16-bit colour is rounded to 8 bits, exactly. Expected values come from the arrays in the files."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from preprocess.pictures.images import decode

LIMIT = 10**6


def _values(num_channels: int) -> np.ndarray:
    """uint16 (9,12,C) with the edges of rounding among them: 0x00ff is 0.996 of a level, 0x8080 exactly half way up."""
    values = np.random.default_rng(num_channels).integers(0, 65536, (9, 12, num_channels), dtype=np.uint16)
    values[0, :6] = np.array([0, 128, 129, 255, 0x8080, 65535], np.uint16)[:, None]
    return values


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(values.astype(float) * 255 / 65535 + 0.5).astype(np.uint8)


def _png(values: np.ndarray, colour_type: int, clear: tuple[int, int, int] | None = None) -> bytes:
    """A 16-bit PNG, rows unfiltered. clear: the one transparent colour."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    chunks += [(b"tRNS", struct.pack(">HHH", *clear))] if clear else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    white = Image.new("RGB", (colour.shape[1], colour.shape[0]), (255, 255, 255))
    white.paste(Image.fromarray(colour), mask=Image.fromarray(alpha))
    return np.asarray(white)


def test_png_rgb() -> None:
    values = _values(3)
    assert np.array_equal(np.asarray(decode(_png(values, 2), LIMIT)), _rounded(values))


@pytest.mark.parametrize("num_channels", [2, 4])
def test_png_with_alpha_lies_rounded_over_white(num_channels: int) -> None:
    values = _values(num_channels)
    eight = _rounded(values)
    colour = np.repeat(eight[..., :1], 3, axis=-1) if num_channels == 2 else eight[..., :3]
    found = decode(_png(values, {2: 4, 4: 6}[num_channels]), LIMIT)
    assert np.array_equal(np.asarray(found), _over_white(colour, eight[..., -1]))


def test_png_with_one_transparent_colour_shows_through_exactly_there() -> None:
    values = _values(3)
    values[2, 3], values[2, 4] = (700, 40000, 65000), (700, 40000, 65001)  # the same in 8 bits
    expected = _rounded(values)
    expected[2, 3] = 255
    found = np.asarray(decode(_png(values, 2, clear=(700, 40000, 65000)), LIMIT))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 4}, {"tile": (16, 16)}])
def test_tiff_rgb(byteorder: str, compression: str | None, layout: dict[str, object]) -> None:
    values = _values(3)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", byteorder=byteorder, compression=compression, **layout)
    assert np.array_equal(np.asarray(decode(file.getvalue(), LIMIT)), _rounded(values))


def test_tiff_rgb_is_turned_as_its_orientation_says() -> None:
    values = _values(3)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", extratags=[(274, 3, 1, 3, True)])  # 3: upside down
    assert np.array_equal(np.asarray(decode(file.getvalue(), LIMIT)), _rounded(values)[::-1, ::-1])
