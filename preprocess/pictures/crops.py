"""Where crops lie. A box is (top, left, bottom, right) in source pixels and always a square.

Every choice comes from a hash of (seed, image, crop number), so it depends on nothing else: not on the order of the
work, the number of workers or a library's random generator.
"""

from __future__ import annotations

import hashlib

from preprocess.config import PreprocessConfig
from preprocess.rejects import Reject

Box = tuple[int, int, int, int]


def unit_values(count: int, *key: object) -> list[float]:
    """`count` numbers in [0, 1), a pure function of `key`."""
    values: list[float] = []
    text = "\0".join(str(part) for part in key).encode("utf-8", "surrogateescape")
    for number in range(count):
        digest = hashlib.blake2b(text, digest_size=8, salt=number.to_bytes(2, "big")).digest()
        values.append((int.from_bytes(digest, "big") >> 11) / 2**53)
    return values


def choose_box(config: PreprocessConfig, image: str, crop: int, height: int, width: int) -> Box:
    """The box of crop number `crop` of an image. Images that are too small for it raise `Reject`."""
    if config.crop == "grid":
        boxes = grid_boxes(height, width, config.crop_pixels or config.size)
        if crop >= len(boxes):
            raise Reject("too_small", f"{height}x{width} has {len(boxes)} grid crops, not {crop + 1}")
        return boxes[crop]
    short = min(height, width)
    if config.crop_pixels > short:
        raise Reject("too_small", f"{height}x{width} is smaller than a crop of {config.crop_pixels}")
    low, high = config.crop_fraction
    if config.crop == "center":
        side = config.crop_pixels or max(1, round(high * short))
        top, left = (height - side) // 2, (width - side) // 2
    else:
        u_side, u_top, u_left = unit_values(3, "crop", config.seed, image, crop)
        side = config.crop_pixels or max(1, round((low + (high - low) * u_side) * short))
        top, left = int(u_top * (height - side + 1)), int(u_left * (width - side + 1))
    return top, left, top + side, left + side


def grid_boxes(height: int, width: int, side: int) -> list[Box]:
    """A tiling with squares of `side`, row by row. The last row and column are moved inwards so that all is covered."""
    if min(height, width) < side:
        return []
    tops, lefts = _starts(height, side), _starts(width, side)
    return [(top, left, top + side, left + side) for top in tops for left in lefts]


def _starts(length: int, side: int) -> list[int]:
    starts = list(range(0, length - side + 1, side))
    if starts[-1] + side < length:
        starts.append(length - side)
    return starts
