"""The protocols of PSNR, by name; `psnr` says what they are."""

from __future__ import annotations

from typing import Literal

Protocol = Literal["rgb", "benchmark", "div2k"]
PROTOCOLS: tuple[Protocol, ...] = ("rgb", "benchmark", "div2k")
