"""What one row of a request to a served model asks for, checked before any work. Every mistake is one sentence that
names the column, the value and what is allowed."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from pipeline.errors import UserError, require
from pipeline.geometry import Size

MAX_PICTURES = 64
"""Pictures that one call may ask for, over all of its rows."""
MAX_PIXELS = 1 << 26
"""Pixels of one row's pictures together (8192 × 8192)."""
MAX_SIDE = 1 << 16
MAX_SCALE = 64.0
MAX_STEPS = 1000
MAX_SEED = (1 << 53) - 1
"""Tables hold numbers as doubles, which tell whole numbers apart up to here."""

_SHARED = ("task", "seed", "steps", "height", "width")
COLUMNS = {"generate": (*_SHARED, "num"), "upscale": (*_SHARED, "image", "scale")}
"""Columns that each task takes."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    num: int
    size: Size
    seed: int
    steps: int | None


@dataclass(frozen=True, kw_only=True)
class Upscale:
    """image: a picture file. Either scale or size is given. steps: None is as the model has them."""

    image: bytes
    scale: float | None
    size: Size | None
    seed: int
    steps: int | None


def parse_row(row: Mapping[Any, Any], default_side: int) -> Generate | Upscale:
    """One row; empty cells (None, NaN) count as not given. default_side: height and width of a picture for which none
    are given. Raises `UserError`."""
    given = {str(key): value for key, value in row.items() if not _is_missing(value)}
    task = given.get("task")
    if not isinstance(task, str) or task not in COLUMNS:
        shown = "missing" if task is None else f"{_short(task)} and is not allowed"
        raise UserError(f"the column `task` is {shown}; use 'generate' or 'upscale'")
    for name in given:
        if name not in COLUMNS[task]:
            raise UserError(f"the column `{_short(name, 40)}` is unknown to {task}; known: {', '.join(COLUMNS[task])}")
    seed = _whole(given, "seed", 0, 0, MAX_SEED)
    steps = _whole(given, "steps", 0, 0, MAX_STEPS) if "steps" in given else None
    if task == "generate":
        num = _whole(given, "num", 1, 1, MAX_PICTURES)
        size = _size(given) or (default_side, default_side)
        check_pixels(size, num)
        return Generate(num=num, size=size, seed=seed, steps=steps)
    if "image" not in given:
        raise UserError("the column `image` is missing; upscale needs a picture file in base64")
    scale, upscaled = _number(given, "scale", MAX_SCALE), _size(given)
    if (scale is None) == (upscaled is None):
        raise UserError("give either `scale` or both `height` and `width`, not both and not neither")
    return Upscale(image=picture_bytes(given["image"]), scale=scale, size=upscaled, seed=seed, steps=steps)


def check_pixels(size: Size, num: int = 1) -> None:
    """`UserError` where a row asks for more pixels than one row may."""
    if size[0] * size[1] * num > MAX_PIXELS:
        raise UserError(f"{num} of {size[0]}x{size[1]} pixels are not allowed; use at most {MAX_PIXELS} pixels a row")


def picture_bytes(value: Any) -> bytes:
    """The file in a cell: bytes, base64 in either alphabet, with or without line breaks and padding, or a data URI."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str):
        raise UserError(f"`image` is {type(value).__name__}; send a picture file in base64")
    text = value.strip()
    if match := re.match(r"data:[^,]{0,200}?(;base64)?,", text, re.IGNORECASE):
        payload = unquote_to_bytes(text[match.end() :])
        if not match[1]:
            return payload
        text = payload.decode("ascii", errors="replace")
    elif re.match(r"(https?|s3|gs|file)://", text):
        raise UserError("`image` is an address; send the picture file itself, in base64")
    elif re.match(r"b['\"]", text):
        raise UserError("`image` is the text of a Python bytes object; send base64.b64encode(data).decode()")
    text = re.sub(r"\s+", "", text).translate(str.maketrans("-_", "+/"))
    if not text:
        raise UserError("`image` is empty; send a picture file in base64")
    if strange := re.search(r"[^A-Za-z0-9+/=]", text):
        raise UserError(f"`image` is not base64: it has {strange[0]!r} at character {strange.start()}")
    text = text.rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"`image` is not base64, or was cut short: {error}") from error


def _size(given: Mapping[str, Any]) -> Size | None:
    if "height" not in given and "width" not in given:
        return None
    for name, other in (("height", "width"), ("width", "height")):
        if name not in given:
            raise UserError(f"`{other}` is given without `{name}`; give both, or neither")
    return _whole(given, "height", 0, 1, MAX_SIDE), _whole(given, "width", 0, 1, MAX_SIDE)


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    if name not in given:
        return default
    number = _parsed(given[name])
    is_whole = number is not None and math.isfinite(number) and number == int(number)
    require(is_whole and low <= number <= high, f"`{name}`", given[name], f"a whole number from {low} to {high}")  # type: ignore[operator]
    return int(number)  # type: ignore[arg-type]


def _number(given: Mapping[str, Any], name: str, high: float) -> float | None:
    if name not in given:
        return None
    number = _parsed(given[name])
    require(number is not None and 0 < number <= high, f"`{name}`", given[name], f"a number above 0, up to {high:g}")
    return float(number)  # type: ignore[arg-type]


def _parsed(value: Any) -> float | int | None:
    """A cell as a number: tables hold them as numbers, or as text."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9.]{1,40}(e[+-]?[0-9]{1,3})?\s*", value, re.IGNORECASE):
        try:
            return float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not hasattr(value, "__float__") or type(value).__name__ == "bool_":
        return None
    try:
        return int(value) if hasattr(value, "__index__") else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _short(value: Any, length: int = 60) -> str:
    text = repr(value) if not isinstance(value, str) or length == 60 else value
    return text if len(text) <= length else f"{text[:length]}..."


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
