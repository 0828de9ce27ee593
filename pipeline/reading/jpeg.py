"""JPEG damage that shows, which libjpeg decodes without a word: holes, and data that ends early or does not fit.

libjpeg fills what is missing with grey and decodes zeros as flat or brown blocks. But whoever lost bytes also lost
count: the picture is complete too early or too late. So the decoder is fed in pieces, and after each it is looked
whether the last row of pixels has been written. What comes after the last row does no harm, nor does a missing end
marker. Where all scans are needed before the first row (progressive files), only files with a hole of zeros or without
an end are judged: by decoding them once more, with other bytes in place of those that should not matter. A file that
lost so little that a few blocks at most look otherwise is kept: that, too, is seen by decoding it with other bytes in
place of the lost ones.

More than 350 lines: what each judgement rests on is said beside it, and apart they would each need the others' words.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_START, _END, _SCAN, _RESTART_INTERVAL, _TABLES = 0xD8, 0xD9, 0xDA, 0xDD, 0xC4
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PLAIN_FRAMES = (0xC0, 0xC1)
_PROGRESSIVE_FRAME = 0xC2
_RESTARTS = re.compile(rb"\xff([\xd0-\xd7])")
_MARKER = re.compile(rb"\xff+[^\x00\xff]")
_MARKER_BUT_RESTART = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")
_LOST = re.compile(rb"\xff\xff+\x00")
_HOLE = 24
"""Zero bytes in a row that no picture has by itself, where zeros do not stand for flat blocks."""
_LARGE_HOLE = 64
_TAIL = 64
"""Bytes before the end that the last block may have started in: earlier, and the rest is of no block."""
_SHORT_TAIL = 24
_SLACK = 2
"""Bytes that belong to a last block though they look like padding: a 0xff is written as 0xff 0x00."""
_PADDING = bytes(8)
"""The decoder reads a little ahead."""
_BLOCK = 1 << 16
_VISIBLE = 8
"""Levels of 255 by which a pixel has to change to be seen."""
_FEW_PIXELS = (256, 1024)
"""So many pixels may be lost: one in a thousand, but at least a block of 16 × 16, at most four."""
_REFINED = 20
"""Of a progressive file, one pixel in so many may lack its last, invisible bits."""
_MARK = (1, 254, 3, 77)
_NOISE = (bytes(i * 101 % 251 for i in range(1024)), bytes(i * 59 % 241 for i in range(1024)))
"""Bytes, none of them 0xff, that decode to something."""


@dataclass
class _Scan:
    """Entropy-coded data at [start, end)."""

    start: int
    end: int
    num_components: int
    tables: list[int]
    """The symbol that zeros stand for, in the AC table of each component."""
    is_mean: bool
    """Of the blocks' means only: in flat pictures many zeros."""
    is_fine: bool
    """The last bits of the means: they hardly show."""
    is_details: bool
    """The first of what each block holds beside its mean: encoders write runs of empty blocks as one number."""


@dataclass
class _Layout:
    frame: int = 0
    height: int = 0
    width: int = 0
    sampling: list[tuple[int, int]] = field(default_factory=list)
    restart_interval: int = 0
    scans: list[_Scan] = field(default_factory=list)
    has_end: bool = False
    missing: dict[int, set[int]] = field(default_factory=dict)
    """Component → its coefficients that no scan of a progressive file has brought to the last bit."""

    @property
    def is_progressive(self) -> bool:
        return self.frame == _PROGRESSIVE_FRAME

    @property
    def is_plain(self) -> bool:
        """One scan with everything: rows come out while it is read."""
        one = len(self.scans) == 1 and self.scans[0].num_components == len(self.sampling)
        return self.frame in _PLAIN_FRAMES and one

    @property
    def unit(self) -> tuple[int, int]:
        """Pixels across and down of what restarts count."""
        is_one = len(self.sampling) == 1
        return (8, 8) if is_one else (8 * max(h for h, _ in self.sampling), 8 * max(v for _, v in self.sampling))

    @property
    def unit_pixels(self) -> int:
        return self.unit[0] * self.unit[1]


def watch(image: Image.Image, data: bytes) -> Feed | None:
    """Before loading: let an opened JPEG be read in pieces. None for other pictures, and where the file cannot be
    followed, which Pillow then judges."""
    if image.format not in ("JPEG", "MPO") or not image.tile:  # type: ignore[attr-defined]
        return None
    try:
        layout = _read(data)
    except (IndexError, struct.error):
        return None
    if not layout.scans:
        return None
    feed = Feed(image, data, layout)
    image.fp = feed  # type: ignore[attr-defined]
    return feed


class Feed(io.BytesIO):
    """The file, as the decoder gets it. `trouble` says afterwards what shows, "" for nothing."""

    def __init__(self, image: Any, data: bytes, layout: _Layout) -> None:
        super().__init__(data)
        self._image, self._data, self._layout = image, data, layout
        self._pieces = [data if layout.has_end else data + b"\xff\xd9"]
        self._ends: list[int] = []
        if layout.is_plain:
            self._cut()
        self._number, self._place = 0, 0
        self._complete: dict[int, bool] = {}

    def _cut(self) -> None:
        scan, data = self._layout.scans[0], self._data
        self._padding_start = scan.start + len(data[scan.start : scan.end].rstrip(b"\0\xff"))
        self._hole = _hole(data, scan)
        stops = {*self._places_around_padding(), scan.end}
        if self._hole is not None:
            stops.add(min(scan.end, self._hole + len(_PADDING)))
        self._ends = sorted(stops)
        starts = [0, *self._ends]
        pieces = [data[start:stop] for start, stop in zip(starts, self._ends)]
        pieces[-1] += _PADDING
        self._pieces = [*pieces, data[scan.end :] if self._layout.has_end else b"\xff\xd9"]

    def seek(self, offset: int, whence: int = 0) -> int:
        self._number, self._place = 0, offset
        return offset

    def read(self, size: int | None = -1) -> bytes:
        if self._number == 0 and self._place == 0:
            self._mark_last_row()
        while self._number < len(self._pieces):
            piece = self._pieces[self._number]
            if self._place < len(piece):
                part = piece[self._place : self._place + _BLOCK]
                self._place += len(part)
                return part
            if self._number < len(self._ends):
                self._complete[self._ends[self._number]] = self._has_last_row()
            self._number, self._place = self._number + 1, 0
        return b""

    def trouble(self) -> str:
        layout, data = self._layout, self._data
        if not layout.is_plain:
            return self._trouble_of_scans()
        scan = layout.scans[0]
        end = scan.end
        if layout.restart_interval and (num_lost := _lost_segments(data, layout)):
            is_cut = num_lost * layout.restart_interval * layout.unit_pixels <= _few(layout)
            return "" if is_cut else "restart markers are missing"
        if self._hole is not None and not self._complete.get(min(end, self._hole + len(_PADDING)), True):
            return f"a hole at byte {self._hole}" if self._is_seen(self._hole) else ""
        if not self._complete.get(end, True):
            place = self._padding_start if end - self._padding_start >= len(_PADDING) else end
            return f"the picture's data end early, at byte {end}" if self._is_seen(place) else ""
        tail, padded = self._places_around_padding()
        if self._complete.get(tail, True):
            return f"the picture is complete before byte {tail}, but its data go on to byte {self._padding_start}"
        if not self._complete.get(padded, True):  # then zeros stand for the last blocks; whoever lost data has too many
            is_lost = not self._matters(end - 2 * _SLACK) and self._is_seen(self._padding_start)
            return f"the picture's data end early, at byte {self._padding_start}" if is_lost else ""
        return ""

    def _places_around_padding(self) -> tuple[int, int]:
        """Where the picture must not be complete yet, and where it has to be if its data end with padding. Where zeros
        may be flat blocks, many of them may be a hole that made it complete early: little may follow then."""
        scan, start = self._layout.scans[0], self._padding_start
        is_doubtful = not _are_zeros_strange(scan) and self._data.find(bytes(_HOLE), scan.start, start) >= 0
        tail = _SHORT_TAIL if is_doubtful else _TAIL
        return max(scan.start, start - tail), min(scan.end, start + len(_PADDING))

    def _matters(self, place: int) -> bool:
        """Whether any pixel depends on what is at `place` and after it."""
        end = self._layout.scans[0].end
        some, others = (_pixels(self._data[:place] + noise + self._data[end:]) for noise in _NOISE)
        return not np.array_equal(some, others)

    def _is_seen(self, place: int, scan: _Scan | None = None) -> bool:
        """Whether more than a few pixels depend on the lost bytes of a scan, from `place` to the next restart."""
        data, layout, end = self._data, self._layout, (scan or self._layout.scans[0]).end
        found = _RESTARTS.search(data, place, end) if layout.restart_interval else None
        rest = data[found.start() if found else end :]
        some, others = (_pixels(data[:place] + 4 * noise + rest) for noise in _NOISE)
        return _num_changed(some, others) > _few(layout)

    def _trouble_of_scans(self) -> str:
        data, scans = self._data, self._layout.scans
        if self._layout.is_progressive:
            if any(self._layout.missing.values()):
                return "the picture's data end early: scans are missing"
            for scan in scans:
                used = scan.start + len(data[scan.start : scan.end].rstrip(b"\0"))
                if scan.is_details and (place := data.find(bytes(_HOLE), scan.start, used)) >= 0:
                    return f"a hole at byte {place}"
                place = -1 if scan.is_mean or scan.is_details else data.find(bytes(_LARGE_HOLE), scan.start, used)
                if place >= 0 and self._is_seen(place, scan):
                    return f"a hole at byte {place}"
        holes = [hole for scan in scans if (hole := _first_hole(data, scan)) is not None]
        if not holes and self._layout.has_end:
            return ""
        if not self._layout.has_end and data.endswith(bytes(_HOLE)):  # padding, or in place of what is lost
            data = data.rstrip(b"\0") + b"\0"
            scans = _read(data).scans
        if _are_needed(data, self._layout, scans):
            return f"a hole at byte {holes[0]}" if holes else "the picture's data end early"
        spoilt = [scan for scan in scans if _first_hole(data, scan) is not None and _is_early(data, scan)]
        return f"a hole at byte {_first_hole(data, spoilt[0])}" if spoilt else ""

    def _mark_last_row(self) -> None:
        image = self._image
        if self._layout.is_plain and image.im is not None:
            ink = _MARK[0] if len(image.im.mode) == 1 else _MARK[: len(image.getbands())]
            image.im.paste(ink, (0, image.height - 1, image.width, image.height))

    def _has_last_row(self) -> bool:
        image = self._image
        row = image.im.crop((0, image.height - 1, image.width, image.height))
        bands = len(image.getbands())
        extrema = [row.getband(i).getextrema() for i in range(bands)] if bands > 1 else [row.getextrema()]
        return bool(extrema != [(mark, mark) for mark in _MARK[:bands]])


def _read(data: bytes) -> _Layout:
    """The file's segments, up to its end marker."""
    layout, place = _Layout(), 2
    zeros: dict[int, int] = {}
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            place += 1
            continue
        kind = data[place + 1]
        if kind == 0xFF or kind in (0, 1) or 0xD0 <= kind <= _START:
            place += 1 if kind == 0xFF else 2
            continue
        if kind == _END:
            break
        (length,) = struct.unpack_from(">H", data, place + 2)
        body, place = data[place + 4 : place + 2 + length], place + 2 + length
        if kind in _FRAMES:
            layout.frame = kind
            layout.height, layout.width = struct.unpack_from(">HH", body, 1)
            parts = [body[6 + 3 * i : 9 + 3 * i] for i in range(body[5])]
            layout.sampling = [(part[1] >> 4, part[1] & 15) for part in parts]
            layout.missing = {part[0]: set(range(64)) for part in parts}
        elif kind == _RESTART_INTERVAL:
            (layout.restart_interval,) = struct.unpack_from(">H", body)
        elif kind == _TABLES:
            zeros.update(_symbols_of_zeros(body))
        elif kind == _SCAN:
            place = _add_scan(layout, data, body, place, zeros)
    layout.has_end = data[place : place + 2] == b"\xff\xd9"
    return layout


def _add_scan(layout: _Layout, data: bytes, body: bytes, start: int, zeros: dict[int, int]) -> int:
    num = body[0]
    tables = [zeros.get(body[2 + 2 * i] & 15, 0) for i in range(num)]
    found = (_MARKER_BUT_RESTART if layout.restart_interval else _MARKER).search(data, start)
    end = found.start() if found else len(data)
    if not found and data.endswith(b"\xff"):
        end = len(data.rstrip(b"\xff"))
    first, last, approximation = body[1 + 2 * num : 4 + 2 * num]
    is_fine = approximation >> 4 > 0
    layout.scans.append(_Scan(start, end, num, tables, last == 0, last == 0 and is_fine, first > 0 and not is_fine))
    if approximation & 15 == 0:
        for component in body[1 : 1 + 2 * num : 2]:
            layout.missing.get(component, set()).difference_update(range(first, last + 1))
    return end


def _symbols_of_zeros(body: bytes) -> dict[int, int]:
    """AC table → the symbol whose code is all zeros: the first of the shortest codes."""
    found, place = {}, 0
    while place + 17 <= len(body):
        total = sum(body[place + 1 : place + 17])
        if body[place] >> 4 == 1 and total:
            found[body[place] & 15] = body[place + 17]
        place += 17 + total
    return found


def _hole(data: bytes, scan: _Scan) -> int | None:
    """Where bytes begin that no encoder wrote: 0xff in a row, or zeros unless they may stand for flat blocks."""
    found = _LOST.search(data, scan.start, scan.end)
    places = [found.start()] if found else []
    if _are_zeros_strange(scan) and (place := data.find(bytes(_HOLE), scan.start, scan.end)) >= 0:
        places.append(place)
    return min(places, default=None)


def _lost_segments(data: bytes, layout: _Layout) -> int:
    """Restart segments of which the marker is not there or not in turn: all from the first such on."""
    scan, unit = layout.scans[0], layout.unit
    num_blocks = -(-layout.width // unit[0]) * -(-layout.height // unit[1])
    numbers = [match[0] - 0xD0 for match in _RESTARTS.findall(data, scan.start, scan.end)]
    expected = [i % 8 for i in range(-(-num_blocks // layout.restart_interval) - 1)]
    wrong = (i for i, number in enumerate(expected) if i >= len(numbers) or numbers[i] != number)
    first = next(wrong, None)
    return 0 if first is None else len(expected) - first + 1


def _are_zeros_strange(scan: _Scan) -> bool:
    """Whether zeros do not stand for flat blocks, in all components: then no encoder writes many."""
    return any(symbol & 15 for symbol in scan.tables)


def _first_hole(data: bytes, scan: _Scan) -> int | None:
    """Where many zeros or 0xff begin in a scan, whatever they may stand for."""
    if scan.is_fine:
        return None
    zeros = bytes(_LARGE_HOLE if scan.is_mean else _HOLE)
    places = (data.find(run, scan.start, scan.end + 4) for run in (zeros, b"\xff\xff\xff\xff"))
    return min((place for place in places if place >= 0), default=None)


def _are_needed(data: bytes, layout: _Layout, scans: list[_Scan]) -> bool:
    """Whether bytes added after the scans change more than a few pixels: else each scan has all that it needs."""
    starts = [0, *(scan.end for scan in scans)]
    stops = [*(scan.end for scan in scans), len(data)]
    noise = _NOISE[0] * (1 + len(data) // len(_NOISE[0]))
    some, others = _pixels(data), _pixels(noise.join(data[a:b] for a, b in zip(starts, stops)))
    is_seen = _num_changed(some, others) > _few(layout)
    return is_seen or _num_changed(some, others, 0) > max(_few(layout), layout.width * layout.height // _REFINED)


def _few(layout: _Layout) -> int:
    """Pixels that may be lost."""
    least, most = _FEW_PIXELS
    return max(least, min(most, layout.width * layout.height // 1000))


def _num_changed(some: NDArray[np.uint8], others: NDArray[np.uint8], levels: int = _VISIBLE) -> int:
    """Pixels that differ by more than so many levels."""
    return int((np.abs(some.astype(np.int16) - others) > levels).any(-1).sum())


def _is_early(data: bytes, scan: _Scan) -> bool:
    """Whether a scan is complete long before its end, though what follows is more than padding."""
    used = scan.start + len(data[scan.start : scan.end].rstrip(b"\0\xff"))
    stop = used - len(_PADDING)
    if stop <= scan.start or (_first_hole(data, scan) or 0) >= used:
        return False
    at_start, early = (
        [_pixels(data[:place] + noise + data[scan.end :]) for noise in _NOISE] for place in (scan.start, stop)
    )
    is_part = not np.array_equal(at_start[0], at_start[1])  # where noise never shows, neither does damage
    return is_part and np.array_equal(early[0], early[1])


def _pixels(data: bytes) -> NDArray[np.uint8]:
    """uint8 (H,W,C)."""
    with Image.open(io.BytesIO(data + b"\xff\xd9"), formats=("JPEG",)) as image:
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1)
