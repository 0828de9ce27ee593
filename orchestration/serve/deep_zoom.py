"""The Deep Zoom convention: a picture as a pyramid of levels, each half as large as the next one, cut into tiles.

https://learn.microsoft.com/en-us/previous-versions/windows/silverlight/dotnet-windows-silverlight/cc645077(v=vs.95)
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

from pipeline.errors import UserError
from pipeline.sizes import MAX_SIDE, Size, Window

TILE = 256
"""Height and width of a tile, in pixels; tiles do not overlap."""
DOUBLINGS = 8
"""The largest level shows 2^8 = 256 pixels a side for each pixel of the picture."""


@dataclass(frozen=True)
class Pyramid:
    """Levels 0 (one pixel) to `top`; level `own` has the picture's own `size` (H, W)."""

    size: Size

    @property
    def doublings(self) -> int:
        """Levels above `own`: as many as an output may have pixels for."""
        return next(k for k in range(DOUBLINGS, -1, -1) if max(self.size) << k <= MAX_SIDE)

    @property
    def own(self) -> int:
        return (max(self.size) - 1).bit_length()

    @property
    def top(self) -> int:
        return self.own + self.doublings

    @property
    def full(self) -> Size:
        """(H, W) of the largest level."""
        return self.level_size(self.top)

    def level_size(self, level: int) -> Size:
        """(H, W) of a level. Raises `UserError` where there is none."""
        if not 0 <= level <= self.top:
            raise UserError(f"there is no level {level}; levels go from 0 to {self.top}")
        shift = level - self.own
        height, width = (side << shift if shift >= 0 else -(-side >> -shift) for side in self.size)
        return max(1, height), max(1, width)

    def window(self, level: int, x: int, y: int) -> Window:
        """The pixels (y0, x0, y1, x1) of a level that its tile in column x and row y shows. Raises `UserError`."""
        height, width = self.level_size(level)
        if not (0 <= x * TILE < width and 0 <= y * TILE < height):
            raise UserError(f"there is no tile {x}_{y} in level {level} of {height}x{width} pixels")
        return y * TILE, x * TILE, min((y + 1) * TILE, height), min((x + 1) * TILE, width)

    def descriptor(self, suffix: str) -> str:
        """The `.dzi` file that viewers read."""
        height, width = self.full
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<Image xmlns="http://schemas.microsoft.com/deepzoom/2008" Format={quoteattr(suffix)} Overlap="0" '
            f'TileSize="{TILE}"><Size Width="{width}" Height="{height}"/></Image>\n'
        )
