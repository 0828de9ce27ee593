"""Photographs that come along: scikit-image's own, all of them free of rights."""

from __future__ import annotations

import importlib.resources

from pipeline.errors import UserError

SAMPLES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


def sample(name: str) -> bytes:
    """The file. Raises `UserError` for other names."""
    if name not in SAMPLES:
        raise UserError(f"there is no photograph {name[:40]!r}; there are {', '.join(SAMPLES)}")
    return (importlib.resources.files("skimage") / "data" / name).read_bytes()
