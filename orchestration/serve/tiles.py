"""Pixels as bytes for a browser, and those that were sent last."""

from __future__ import annotations

import io
import zlib
from collections import OrderedDict
from collections.abc import Hashable

from pipeline.canvas import Pixels
from pipeline.png_stream import PngStream

_TYPES = {"png": "image/png", "tif": "image/tiff", "jpg": "image/jpeg", "webp": "image/webp", "avif": "image/avif"}


def encoded(pixels: Pixels) -> bytes:
    """A PNG, lightly compressed: a tile is sent once and seen at once. Of differences to the row above, runs are nearly
    all that can be saved: in tiles at x1 to x32, zlib's run lengths alone took a third of the time of Pillow's
    quickest, and 5 to 25 % less room."""
    stream = io.BytesIO()
    png = PngStream(stream, pixels.shape[:2], pixels.shape[2], level=1, strategy=zlib.Z_RLE)
    png.write_rows(pixels)
    png.close()
    return stream.getvalue()


def media_type(suffix: str) -> str:
    return _TYPES[suffix]


class SentTiles:
    """Encoded tiles, at most `max_bytes` of them: those that were asked for longest ago go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    def get(self, key: Hashable) -> bytes | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, data: bytes) -> None:
        self.num_bytes += len(data) - len(self._kept.pop(key, b""))
        self._kept[key] = data
        while self.num_bytes > self.max_bytes and self._kept:
            self.num_bytes -= len(self._kept.popitem(last=False)[1])
