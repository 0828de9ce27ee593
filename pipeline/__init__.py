"""The method: models, coordinates, diffusion, sampling, metrics, the saved bundle and inference. Pure PyTorch."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from pipeline.model import LatentZoom as LatentZoom

__all__ = ["LatentZoom"]


def __getattr__(name: str) -> object:
    """`from pipeline import LatentZoom` without importing torch until it is asked for."""
    if name == "LatentZoom":
        from pipeline.model import LatentZoom

        return LatentZoom
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
