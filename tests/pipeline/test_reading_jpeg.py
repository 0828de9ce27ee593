"""JPEG: damage that shows is found, damage that does not show costs nothing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.reading import Unreadable, decode
from tests.pipeline.odd_files import photo, saved

LIMIT = 10**7
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own tables": {"optimize": True},
    "no subsampling": {"subsampling": 0},
    "restarts": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
}


def pictures() -> dict[str, Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    half = Image.new("RGB", (400, 400), (255, 255, 255))
    half.paste(photo(200, 300))
    return {
        "photograph": photo(200, 300),
        "white": Image.new("RGB", (300, 200), (255, 255, 255)),
        "slope": Image.fromarray(np.tile(np.linspace(0, 255, 300).astype(np.uint8)[:, None, None], (1, 200, 3))),
        "noise": Image.fromarray(noise),
        "one pixel": Image.new("RGB", (1, 1), (9, 8, 7)),
        "grey": photo(200, 300).convert("L"),
        "print": photo(200, 300).convert("CMYK"),
        "half white": half,
    }


def is_good(data: bytes) -> bool:
    try:
        decode(data, LIMIT)
    except Unreadable as error:
        assert error.reason == "damaged"
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quality", [10, 75, 92, 100])
def test_whole_pictures_are_kept(kind: str, quality: int) -> None:
    for name, image in pictures().items():
        data = saved(image, "JPEG", quality=quality, **KINDS[kind])
        assert is_good(data), name
        assert is_good(data[:-2]), f"{name} without its end marker"
        assert is_good(data + b"junk" * 40), f"{name} with something behind it"
        assert is_good(data[:-2] + b"\x13\x77" * 9 + data[-2:]), f"{name} with some bytes too many"
        for padding in (bytes(60), bytes(300)):
            assert is_good(data[:-2] + padding + data[-2:]), f"{name} with zeros before its end marker"
            assert is_good(data[:-2] + padding), f"{name} with zeros instead of its end marker"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["photograph", "noise", "grey", "print", "half white"])
def test_what_ends_early_is_damaged(kind: str, name: str) -> None:
    data = saved(pictures()[name], "JPEG", quality=92, **KINDS[kind])
    assert not is_good(data[: len(data) // 2] + bytes(len(data) - len(data) // 2)), "its second half are zeros"
    assert not is_good(data[: int(len(data) * 0.9)]), "cut"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "progressive"])
@pytest.mark.parametrize("name", ["photograph", "noise", "grey"])
@pytest.mark.parametrize("quality", [75, 92])
def test_holes_are_damage(kind: str, name: str, quality: int) -> None:
    data = saved(pictures()[name], "JPEG", quality=quality, **KINDS[kind])
    start = data.rindex(b"\xff\xda") + 64
    for number in range(4):
        place = random.Random(number).randrange(start, len(data) - 600)
        for hole in (bytes(400), b"\xff" * 400):
            assert not is_good(data[:place] + hole + data[place + 400 :]), place


def test_progressive_holes_that_end_a_scan_early_are_damage() -> None:
    data = saved(pictures()["photograph"], "JPEG", quality=92, progressive=True)
    start = data.index(b"\xff\xda") + 400
    assert not is_good(data[:start] + bytes(400) + data[start + 400 :])


def test_progressive_files_that_lack_scans_are_damaged_though_their_end_marker_is_there() -> None:
    for name in ("photograph", "grey", "print"):
        data = saved(pictures()[name], "JPEG", quality=85, progressive=True)
        last = data.rindex(b"\xff\xda")
        for cut in (last, last // 2, last * 3 // 4):
            assert not is_good(data[:cut] + b"\xff\xd9")


@pytest.mark.parametrize("hole", [64, 400])
def test_holes_in_the_details_of_progressive_files_are_damage(hole: int) -> None:
    data = saved(pictures()["photograph"], "JPEG", quality=92, progressive=True)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    assert not is_good(data[: second + 100] + bytes(hole) + data[second + 100 + hole :])


def test_progressive_files_may_be_padded_with_or_without_their_end_marker() -> None:
    for size in ((384, 512), (200, 300)):
        data = saved(photo(*size), "JPEG", quality=95, progressive=True)
        for padding in (bytes(40), bytes(300), b"\xff" * 40):
            assert is_good(data[:-2] + padding + data[-2:]) and is_good(data[:-2] + padding)
        start = data.rindex(b"\xff\xda") + 40
        assert not is_good(data[:start] + bytes(len(data) - start))


def test_lost_restart_markers_are_damage() -> None:
    data = saved(pictures()["photograph"], "JPEG", quality=92, restart_marker_blocks=4)
    place = data.index(b"\xff\xd3", data.rindex(b"\xff\xda"))
    assert not is_good(data[:place] + data[place + 2 :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quality", [75, 92])
def test_files_that_lack_their_last_few_bytes_are_kept(kind: str, quality: int) -> None:
    for name in ("photograph", "grey"):
        data = saved(pictures()[name], "JPEG", quality=quality, **KINDS[kind])
        for num in (3, 5, 8):
            assert is_good(data[:-num]), f"{name} without {num} bytes"
            assert is_good(data[:-num] + bytes(num)), f"{name} with {num} zeros instead"


@pytest.mark.parametrize("num", range(4))
def test_holes_where_zeros_stand_for_flat_blocks_are_damage(num: int) -> None:
    half = Image.new("RGB", (320, 300), (255, 255, 255))
    half.paste(photo(200, 300))
    data = saved(half, "JPEG", quality=20, optimize=True)
    start = data.rindex(b"\xff\xda") + 64
    place = random.Random(num).randrange(start, start + (len(data) - start) // 2)
    assert not is_good(data[:place] + bytes(64) + data[place + 64 :])


def test_holes_of_64_bytes_in_the_means_of_progressive_files_are_damage() -> None:
    data = saved(pictures()["photograph"], "JPEG", quality=60, progressive=True)
    place = data.index(b"\xff\xda") + 100
    assert not is_good(data[:place] + bytes(64) + data[place + 64 :])


def test_holes_in_the_last_bits_of_progressive_files_are_damage_where_they_show() -> None:
    data = saved(pictures()["photograph"], "JPEG", quality=50, progressive=True)
    place = data.rindex(b"\xff\xda") + 70
    assert not is_good(data[:place] + bytes(64) + data[place + 64 :])
