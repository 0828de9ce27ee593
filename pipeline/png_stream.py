"""A PNG (third edition of the specification) written row by row: in memory are the rows at hand, never the picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import IO

import numpy as np
from numpy.typing import NDArray

_PART = 1 << 20
_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # channels → PNG colour type: grey, grey with alpha, RGB, RGBA


class PngStream:
    """8-bit PNG of (height, width, channels 1 to 4) to a binary stream that need not seek.

    text: keyword → value, icc: colour profile, exif: an EXIF block. level, strategy: zlib's. Every row is stored as
    its difference to the row above, which suits pictures and costs one subtraction.
    """

    def __init__(
        self,
        stream: IO[bytes],
        size: tuple[int, int],
        channels: int = 3,
        *,
        text: Mapping[str, str] | None = None,
        icc: bytes | None = None,
        exif: bytes | None = None,
        level: int = 3,
        strategy: int = zlib.Z_DEFAULT_STRATEGY,
    ) -> None:
        self.stream, self.size, self.channels = stream, size, channels
        self.num_written = 0
        self._above: NDArray[np.uint8] = np.zeros((1, size[1] * channels), np.uint8)
        self._compressor = zlib.compressobj(level, strategy=strategy)
        self._waiting = bytearray()
        stream.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, _COLOUR[channels], 0, 0, 0))
        if icc:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
        if exif:
            self._chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
        for keyword, value in (text or {}).items():
            name = keyword.encode("latin-1")
            self._chunk(b"iTXt", name + b"\0\0\0\0\0" + value.encode())

    def write_rows(self, rows: NDArray[np.uint8]) -> None:
        """The next rows, (n, width, channels)."""
        num = len(rows)
        flat = np.ascontiguousarray(rows).reshape(num, -1)
        assert flat.shape[1] == self._above.shape[1] and self.num_written + num <= self.size[0]
        filtered = np.empty((num, flat.shape[1] + 1), np.uint8)
        filtered[:, 0] = 2  # "Up"
        np.subtract(flat[:1], self._above, out=filtered[:1, 1:])
        np.subtract(flat[1:], flat[:-1], out=filtered[1:, 1:])
        self._above = flat[-1:].copy()
        self._waiting += self._compressor.compress(filtered.data)
        self.num_written += num
        if len(self._waiting) >= _PART:
            self._flush()

    def close(self) -> None:
        """End the picture; the stream stays open."""
        assert self.num_written == self.size[0], f"{self.num_written} rows of {self.size[0]}"
        self._waiting += self._compressor.flush()
        self._flush()
        self._chunk(b"IEND", b"")

    def _flush(self) -> None:
        self._chunk(b"IDAT", bytes(self._waiting))
        self._waiting.clear()

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self.stream.write(struct.pack(">I", len(data)) + kind)
        self.stream.write(data)
        self.stream.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
