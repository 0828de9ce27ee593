"""Rows of a request to a served model: what is understood, and what every mistake is called."""

import base64
import io
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.served_request import MAX_SEED, MAX_STEPS, Generate, Upscale, parse_row, picture_bytes


def file_of(form="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


DATA = bytes(range(256)) + b"xy"  # its base64 has '+', '/' and padding
PLAIN = base64.b64encode(DATA).decode()
WAYS = {
    "plain": PLAIN,
    "wrapped": base64.encodebytes(DATA).decode(),
    "wrapped for Windows": base64.encodebytes(DATA).decode().replace("\n", "\r\n"),
    "URL-safe": base64.urlsafe_b64encode(DATA).decode(),
    "without padding": PLAIN.rstrip("="),
    "URL-safe without padding": base64.urlsafe_b64encode(DATA).decode().rstrip("="),
    "spaces around": f"  {PLAIN}\n",
    "data URI": f"data:image/png;base64,{PLAIN}",
    "data URI, wrapped": f"data:image/png;base64,{base64.encodebytes(DATA).decode()}",
    "data URI, other case and parameters": f"DATA:image/webp;name=a.webp;Base64,{PLAIN}",
    "data URI, escaped": f"data:image/png;base64,{urllib.parse.quote(PLAIN, safe='')}",
    "data URI without base64": f"data:image/png,{urllib.parse.quote_from_bytes(DATA)}",
    "bytes": DATA,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_usual_way_to_send_a_file(way):
    assert picture_bytes(WAYS[way]) == DATA


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("not a picture!", "is not base64: it has '!' at character 11"),
        ("http://host/a.png", "is an address"),
        ("s3://bucket/a.png", "is an address"),
        (str(b"abc"), "Python bytes object"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("abcde", "cut short"),
        (3.5, "is float; send a picture file in base64"),
        (["abcd"], "is list"),
    ],
)
def test_what_is_no_file_is_named(value, words):
    with pytest.raises(UserError, match="image") as caught:
        picture_bytes(value)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_are_right():
    nan = float("nan")
    row = {"task": "generate", "num": 2.0, "height": "20", "width": np.int64(33), "seed": MAX_SEED, "image": None}
    assert parse_row({**row, "scale": nan}, 64) == Generate(num=2, size=(20, 33), seed=MAX_SEED, steps=None)
    assert parse_row({"task": "generate"}, 64) == Generate(num=1, size=(64, 64), seed=0, steps=None)
    row = {"task": "upscale", "image": PLAIN, "scale": np.float32(2.5), "num": nan, "steps": 0}
    assert parse_row(row, 64) == Upscale(image=DATA, scale=2.5, size=None, seed=0, steps=0)
    row = {"task": "upscale", "image": PLAIN, "height": 20.0, "width": 30.0}
    assert parse_row(row, 64) == Upscale(image=DATA, scale=None, size=(20, 30), seed=0, steps=None)


GENERATE, UPSCALE = {"task": "generate"}, {"task": "upscale", "image": PLAIN, "scale": 2.0}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "the column `task` is missing"),
        ({"task": "enlarge"}, "the column `task` is 'enlarge'"),
        ({"task": 3}, "the column `task` is 3"),
        ({**GENERATE, "heigth": 3}, "the column `heigth` is unknown to generate; known: task, seed"),
        ({**GENERATE, "scale": 2}, "the column `scale` is unknown to generate"),
        ({**UPSCALE, "num": 2}, "the column `num` is unknown to upscale"),
        ({**GENERATE, "x" * 999: 2}, "xxx...` is unknown"),
        ({**GENERATE, "num": 0}, "`num` = 0 is not allowed; use a whole number from 1 to 64"),
        ({**GENERATE, "num": 65}, "`num` = 65"),
        ({**GENERATE, "num": 1.5}, "`num` = 1.5"),
        ({**GENERATE, "num": True}, "`num` = True"),
        ({**GENERATE, "num": "many"}, "`num` = 'many'"),
        ({**GENERATE, "num": "1.2.3"}, "`num` = '1.2.3'"),
        ({**GENERATE, "num": [1]}, "`num` = [1]"),
        ({**GENERATE, "num": float("inf")}, "`num` = inf"),
        ({**GENERATE, "steps": MAX_STEPS + 1}, f"use a whole number from 0 to {MAX_STEPS}"),
        ({**GENERATE, "seed": -1}, "`seed` = -1"),
        ({**GENERATE, "seed": 2**53}, f"from 0 to {MAX_SEED}"),
        ({**GENERATE, "height": 30}, "`height` is given without `width`"),
        ({**GENERATE, "height": 30000, "width": 30000}, "1 of 30000x30000 pixels are not allowed"),
        ({**GENERATE, "height": 4096, "width": 4096, "num": 5}, "5 of 4096x4096 pixels"),
        ({**GENERATE, "height": 10**9, "width": 1}, "`height` = 1000000000"),
        ({**UPSCALE, "scale": 0}, "`scale` = 0 is not allowed; use a number above 0, up to 64"),
        ({**UPSCALE, "scale": 1e9}, "`scale` = 1000000000.0"),
        ({**UPSCALE, "height": 3, "width": 4}, "give either `scale` or both"),
        ({"task": "upscale", "image": PLAIN}, "give either `scale` or both"),
        ({"task": "upscale", "scale": 2}, "the column `image` is missing"),
        ({**UPSCALE, "image": "?"}, "`image` is not base64"),
    ],
)
def test_every_mistake_is_one_sentence_that_names_it(row, words):
    with pytest.raises(UserError) as caught:
        parse_row(row, 64)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300
