"""TIFF layouts beyond those that Pillow is tested for: the right pixels, or the layout's name, and never a surprise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ImageCms

from pipeline.reading import Unreadable, decode, oriented_size
from tests.pipeline.odd_files import packed_tiff, photo, saved

LIMIT = 10**6


def stored(picture: np.ndarray, bits: int) -> np.ndarray:
    """8-bit values in another number of bits."""
    return np.round(picture.astype(float) * (2**bits - 1) / 255).astype(np.int64)


def shown(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, LIMIT).shown()).astype(int)


@pytest.mark.parametrize("tile", [None, (32, 48)])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 16])
def test_any_number_of_bits_in_strips_and_tiles_by_pixels_and_planes(
    bits: int, planar: int, tile: tuple[int, int] | None
) -> None:
    largest = 2**bits - 1
    colour, grey = np.asarray(photo()), np.asarray(photo().convert("L"))[..., None]
    alpha = np.broadcast_to(np.arange(90, dtype=np.uint8) * 2, (60, 90))[..., None]
    opacity = stored(alpha, bits) / largest
    palette = np.random.default_rng(0).integers(0, 256, (2**bits, 3))
    kinds: dict[str, tuple[np.ndarray, int, dict[str, Any], np.ndarray]] = {
        "grey": (stored(grey, bits), 1, {}, stored(grey, bits) / largest),
        "bits from behind": (stored(grey, bits), 1, {"fill": 2}, stored(grey, bits) / largest),
        "0 is white": (largest - stored(grey, bits), 0, {}, stored(grey, bits) / largest),
        "colour": (stored(colour, bits), 2, {}, stored(colour, bits) / largest),
        "print": (np.dstack([largest - stored(colour, bits), 0 * grey]), 5, {}, stored(colour, bits) / largest),
        "grey with alpha": (np.dstack([stored(grey, bits), stored(alpha, bits)]), 1, {"tags": {338: ("H", [2])}},
                            stored(grey, bits) / largest * opacity + 1 - opacity),
    }  # fmt: skip
    if bits <= 8:
        tags = {320: ("H", [int(value) * 257 for value in palette.T.ravel()])}
        kinds["palette"] = (stored(grey, bits), 3, {"tags": tags}, palette[stored(grey, bits)[..., 0]] / 255)
    for number, (kind, (values, photometric, options, want)) in enumerate(kinds.items()):
        options = {"compression": (1, 8, 32773)[number % 3], "order": "<>"[bits // 2 % 2], **options}
        data = packed_tiff(values, bits, photometric, planar=planar, tile=tile, **options)
        error = np.abs(shown(data) - 255 * want)
        assert error.mean() < 0.8 and error.max() <= 2.01, (kind, error.mean())


def test_the_size_is_known_before_decoding_whatever_the_layout() -> None:
    values = np.zeros((20, 30, 3), int)
    for bits, planar in ((8, 1), (8, 2), (12, 1), (16, 2), (16, 1)):
        for turned, size in ((1, (20, 30)), (6, (30, 20))):
            data = packed_tiff(values, bits, 2, planar=planar, tags={274: ("H", [turned])})
            assert oriented_size(data, LIMIT) == size == decode(data, LIMIT).size
    with pytest.raises(Unreadable, match="too_large"):
        oriented_size(packed_tiff(values, 12, 2), 599)


@pytest.mark.parametrize("compression", [5, 8])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("order", "<>")
def test_differences_of_16_bit_values_are_added_up(order: str, planar: int, compression: int) -> None:
    values = np.asarray(photo()).astype(np.int64) * 257
    differences = values.copy()
    differences[:, 1:] -= values[:, :-1]
    data = packed_tiff(differences % 65536, 16, 2, order=order, planar=planar, compression=compression,
                       tags={317: ("H", [2])})  # fmt: skip
    assert np.abs(shown(data) - np.asarray(photo())).max() == 0


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        (packed_tiff(np.zeros((9, 9, 3), int), 8, 1), "minisblack of 3 samples"),
        (packed_tiff(np.zeros((9, 9, 3), int), 8, 6, planar=2), "8-bit ycbcr, none, separate planes"),
        (packed_tiff(np.zeros((9, 9, 3), int), 8, 6, tags={530: ("H", [2, 2])}), "8-bit ycbcr, none"),
        (packed_tiff(np.zeros((9, 9, 1), int), 1, 4), "1-bit mask, none"),
        (packed_tiff(np.zeros((9, 9, 3), int), 8, 9), "photometric 9"),
        (packed_tiff(np.zeros((9, 9, 3), int), 12, 2, tags={317: ("H", [2])}), "12-bit rgb"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_the_layouts_name(data: bytes, layout: str) -> None:
    with pytest.raises(Unreadable, match=layout) as caught:
        decode(data, LIMIT)
    assert caught.value.reason == "unsupported"


def test_lab_colours_are_converted() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(photo(), *profiles, outputMode="LAB")
    assert lab is not None
    assert np.abs(shown(saved(lab, "TIFF")) - np.asarray(photo())).mean() < 1


ODD = [
    packed_tiff(stored(np.asarray(photo(9, 12)), bits), bits, 2, planar=planar, compression=compression, tile=tile)
    for bits, planar, compression, tile in
    [(8, 1, 1, None), (8, 2, 5, None), (12, 1, 8, None), (16, 2, 1, (16, 16)), (4, 2, 32773, None)]
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    data=st.sampled_from(
        [*ODD, *(saved(photo(9, 12), "TIFF", compression=kind) for kind in ("raw", "tiff_lzw", "jpeg"))]
    ),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.booleans()), max_size=6),
    cut=st.none() | st.floats(0, 1),
)  # fmt: skip
def test_damage_anywhere_has_a_name(data: bytes, changes: list[tuple[float, int, bool]], cut: float | None) -> None:
    """Most bytes that decide anything lie in the directory, which is at the end."""
    damaged = bytearray(data)
    for at, value, is_near_end in changes:
        span = min(220, len(damaged)) if is_near_end else len(damaged)
        damaged[len(damaged) - span + int(at * span)] = value
    try:
        decode(bytes(damaged[: int(cut * len(damaged))] if cut is not None else damaged), LIMIT)
    except Unreadable as error:
        assert error.reason in ("empty", "not_an_image", "damaged", "too_large", "unsupported")
