"""How large a result shall be: by a factor, a side, its pixels. Exactly one way; all but --size keep the aspect."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.sizes import MAX_SIDE, Size, check_size, parse_size

_WAYS = "--scale, --size, --width, --height, --longest or --megapixels"


@dataclass(frozen=True, kw_only=True)
class WantedSize:
    """size: "HxW". Raises `UserError` unless exactly one is given and allowed."""

    scale: float | None = None
    size: str = ""
    width: int | None = None
    height: int | None = None
    longest: int | None = None
    megapixels: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value not in (None, "")}
        if {"width", "height"} <= given.keys():
            raise UserError(
                "--width and --height each keep the aspect, so give one of them; for a picture of exactly this height "
                f"and width, stretched where it must be: --size {self.height}x{self.width}"
            )
        if len(given) != 1:
            raise UserError(f"give exactly one of {_WAYS}")
        if self.size:
            if parse_size(self.size) and not any(sign in self.size.lower() for sign in "x×"):
                raise UserError(
                    f"--size {self.size} is not a height and a width; give both, such as 700x1000, or keep the aspect "
                    f"by --longest {self.size}, --width {self.size} or --height {self.size}"
                )
            return
        (name, value), *_ = given.items()
        if not 0 < value <= MAX_SIDE**2:
            raise UserError(f"--{name} {value:g} is not allowed; use a positive number that gives a picture")

    def of(self, source: Size) -> Size:
        """The output (H, W) for a picture of `source` (H, W). `UserError` beyond the largest side."""
        if self.size:
            return parse_size(self.size)
        height, width = source
        if self.scale is not None:
            factor = self.scale
        elif self.height is not None:
            return check_size((self.height, _side(width * self.height / height)))
        elif self.width is not None:
            return check_size((_side(height * self.width / width), self.width))
        elif self.longest is not None:
            longest = max(source)
            return check_size((_side(height * self.longest / longest), _side(width * self.longest / longest)))
        else:
            assert self.megapixels is not None
            factor = math.sqrt(self.megapixels * 1e6 / (height * width))
        if max(source) * factor == math.inf:
            raise UserError(f"--scale {factor:g} is not allowed; use a positive number")
        return check_size((_side(height * factor), _side(width * factor)))


def _side(pixels: float) -> int:
    return max(1, round(pixels))
