"""Networks applied tile by tile: overlapping tiles whose results are blended, so that memory is that of one tile.

A tile's weight is 1 inside and falls linearly to zero over the overlap, except at the border of the whole. What lies
within `overlap` / 4 of a tile's inner edge, where a network feels the missing surroundings most, has no weight.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from pipeline.feature_cache import FeatureCache, num_bytes
from pipeline.geometry import Size, Window
from pipeline.images import finite
from pipeline.kept import Keep, keep_nothing
from pipeline.windows import drawn_size, reduced_window


@dataclass(frozen=True)
class Tiling:
    """Tiles of `tile` × `tile` cells that overlap by `overlap`, both multiples of `multiple`."""

    tile: int = 64
    overlap: int = 16
    multiple: int = 1

    def __post_init__(self) -> None:
        if not (self.tile > 0 and 0 <= 2 * self.overlap <= self.tile):
            raise UserError(f"tile = {self.tile} with overlap = {self.overlap} is not allowed; overlap at most half")
        if self.tile % self.multiple or self.overlap % self.multiple:
            raise UserError(f"tile and overlap must be multiples of {self.multiple} latent cells")

    def spans(self, length: int) -> list[tuple[int, int]]:
        """[start, stop) of each tile along an axis. All are `tile` long where the axis is; the last one is moved back
        to end with the axis, and so overlaps its neighbour more."""
        if length <= self.tile:
            return [(0, length)]
        stride = self.tile - self.overlap
        starts = [*range(0, length - self.tile, stride), length - self.tile]
        return [(start, start + self.tile) for start in starts]

    def windows(self, size: Size) -> list[Window]:
        """(y0, x0, y1, x1) of every tile."""
        return [(y0, x0, y1, x1) for y0, y1 in self.spans(size[0]) for x0, x1 in self.spans(size[1])]

    def weight(self, window: Window, size: Size) -> Tensor:
        """Blend weight of each cell of a tile, (y1-y0, x1-x0); what tiles add up to is divided by their sum."""
        y0, x0, y1, x1 = window
        return self._ramp(y0, y1, size[0])[:, None] * self._ramp(x0, x1, size[1])[None, :]

    def _ramp(self, start: int, stop: int, length: int) -> Tensor:
        margin = self.overlap // 4
        rise = max(1, self.overlap - 2 * margin)
        distance = torch.arange(stop - start, dtype=torch.float32) + 0.5
        ramp = torch.ones(stop - start)
        if start > 0:
            ramp = torch.minimum(ramp, ((distance - margin) / rise).clamp(0, 1))
        if stop < length:
            ramp = torch.minimum(ramp, ((distance.flip(0) - margin) / rise).clamp(0, 1))
        return ramp


def whole(size: Size) -> Tiling:
    """One tile over everything."""
    return Tiling(max(size), 0)


def blend_tiles(size: Size, tiling: Tiling, evaluate: Callable[[Window], Tensor]) -> Tensor:
    """`evaluate` gives a tile's result (B,c,y1-y0,x1-x0) → the whole, (B,c,*size). One tile: its result itself."""
    windows = tiling.windows(size)
    if len(windows) == 1:
        return evaluate(windows[0])
    total, weights = None, torch.zeros(size)
    for window in windows:
        y0, x0, y1, x1 = window
        weight = tiling.weight(window, size)
        result = evaluate(window)
        if total is None:
            total = result.new_zeros(*result.shape[:2], *size)
        total[:, :, y0:y1, x0:x1] += result * weight.to(result, non_blocking=True)
        weights[y0:y1, x0:x1] += weight
    assert total is not None
    return total.div_(weights.to(total, non_blocking=True))


def tiled_prediction(
    predict: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    condition: Tensor | None,
    tiling: Tiling,
    keep: Keep = keep_nothing,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser (z_t, t, condition) as a function of the whole z_t and t: in tiles, blended. Because samplers call it
    at every step, neighbouring tiles agree from the first step on (Bar-Tal et al., "MultiDiffusion", ICML 2023). keep:
    each call's tiles are its pieces, step after step."""
    calls = itertools.count()

    def predict_whole(z_t: Tensor, t: Tensor) -> Tensor:
        call = next(calls)

        def evaluate(window: Window) -> Tensor:
            y0, x0, y1, x1 = window
            part = None if condition is None else condition[:, :, y0:y1, x0:x1]
            piece = keep(f"step-{call}-{y0}-{x0}", lambda: predict(z_t[:, :, y0:y1, x0:x1], t, part))
            return piece.to(z_t.device)

        return blend_tiles((z_t.shape[2], z_t.shape[3]), tiling, evaluate)

    return predict_whole


_MARGIN = 2
"""Cells around a tile whose features it holds too, so that a window of the tile's own pixels needs no other tile."""


FEATURE_BYTES = 1 << 29
"""Of features that are kept, unless told otherwise."""


class TiledDecoder:
    """An implicit decoder over a latent (B,C,h,w) of any size: D_phi in tiles, made when a window needs them and kept
    while there is room. A latent of one tile is decoded exactly as without tiles.

    Where D_phi sees a bounded neighbourhood only (no normalisation: `PlainFeatureDecoder.halo`), each tile is evaluated
    with that neighbourhood around it, so tiles of any size equal the whole. Otherwise overlapping tiles are blended.
    Outputs with fewer pixels than the latent has cells are drawn larger and reduced. Windows drawn row by row, as files
    are, evaluate each tile once where a row of tiles and three more fit into `cache_bytes`.
    """

    def __init__(
        self, decoder: ImplicitDecoder, latent: Tensor, size: Size, tiling: Tiling, *, cache_bytes: int = FEATURE_BYTES
    ) -> None:
        self.halo = decoder.trunk.halo
        self.decoder, self.latent, self.size = decoder, latent, size
        self.tiling = tiling if self.halo is None else Tiling(tiling.tile, 0, tiling.multiple)
        self.cells: Size = (latent.shape[2], latent.shape[3])
        self.drawn = drawn_size(size, self.cells)
        self._kept, self._comes_in_rows = FeatureCache(cache_bytes), True
        self._table: tuple[Window, Tensor] | None = None

    def resized(self, size: Size) -> TiledDecoder:
        """The same latent at another size, with the tiles of features that this one has and makes: for windows in any
        order, at any sizes, of several threads (each with a decoder of its own)."""
        other = copy.copy(self)
        other.size, other.drawn = size, drawn_size(size, self.cells)
        other._comes_in_rows = False
        return other

    @property
    def _is_whole(self) -> bool:
        """Whether the latent is one tile."""
        return len(self.tiling.windows(self.cells)) == 1

    @property
    def feature_bytes(self) -> int:
        """Memory of the features that are kept."""
        return self._kept.num_bytes

    @property
    def num_bytes(self) -> int:
        """Memory of the latent and of the features that are kept."""
        return num_bytes(self.latent) + self.feature_bytes

    def missing(self, window: Window | None = None) -> list[Window]:
        """The tiles, in cells, that a window of the output (the whole without) reads and that are not kept (any more):
        `make` makes one, before it is drawn."""
        tiles = self.tiling.windows(self.cells)
        if window is not None and not self._is_whole:
            (y0, y1), (x0, x1) = (_cells(window[i], window[i + 2], self.size[i], self.cells[i]) for i in (0, 1))
            if self.halo is None:
                tiles = [tile for tile, _ in _overlapping(tiles, (y0, x0, y1, x1))]
            else:
                tiles = [tile for tile, _ in self._pieces((y0, x0, y1, x1))]
        return [tile for tile in tiles if tile not in self._kept]

    @torch.no_grad()
    def make(self, tile: Window) -> None:
        """Have one of `missing` kept."""
        if self._is_whole:
            self._whole()
        else:
            self._tile(tile)

    @torch.no_grad()
    def window(self, window: Window) -> Tensor:
        """The window (y0,x0,y1,x1) of the output → (B,3,y1-y0,x1-x0). `UserError` when the features overflow."""
        return reduced_window(self._drawn_window, self.drawn, self.size, window)

    def _drawn_window(self, window: Window) -> Tensor:
        region = self._region(window)
        if self._is_whole:  # its table is the same at every size
            table = self._whole()
            return self.decoder.render_table(table, self.drawn, window, cells=self.cells)
        if self._table is None or self._table[0] != region:
            self._table = self._prepared(region)
        return self.decoder.render_table(
            self._table[1], self.drawn, window, cells=self.cells, origin=(region[0], region[1])
        )

    def _whole(self) -> Tensor:
        """The table of a latent of one tile, which is kept instead of its features."""
        return self._kept.get((0, 0, *self.cells), lambda: self._prepared((0, 0, *self.cells))[1])

    def _prepared(self, region: Window) -> tuple[Window, Tensor]:
        return region, finite(self.decoder.prepare(self._blended(region)), "the decoder's table")

    def _region(self, window: Window) -> Window:
        """Cells that the window's pixels touch."""
        (y0, y1), (x0, x1) = (
            _cells(window[axis], window[axis + 2], self.drawn[axis], self.cells[axis]) for axis in (0, 1)
        )
        return y0, x0, y1, x1

    def _blended(self, region: Window) -> Tensor:
        """Features (B,ch,·,·) of a region of cells."""
        tiles = self.tiling.windows(self.cells)
        if len(tiles) == 1:
            return self._made_tile(tiles[0])
        if self.halo is not None:
            return self._exact(region)
        total: Tensor | None = None
        weights: Tensor | None = None
        for tile, (y0, x0, y1, x1) in _overlapping(tiles, region):
            features = self._tile(tile)[:, :, y0 - tile[0] : y1 - tile[0], x0 - tile[1] : x1 - tile[1]]
            weight = self.tiling.weight(tile, self.cells)[y0 - tile[0] : y1 - tile[0], x0 - tile[1] : x1 - tile[1]]
            if total is None or weights is None:
                sides = region[2] - region[0], region[3] - region[1]
                total, weights = features.new_zeros(*features.shape[:2], *sides), features.new_zeros(sides)
            here = slice(y0 - region[0], y1 - region[0]), slice(x0 - region[1], x1 - region[1])
            weight = weight.to(weights, non_blocking=True)
            total[:, :, here[0], here[1]] += features * weight.to(features)
            weights[here] += weight
        assert total is not None and weights is not None
        return total.div_(weights)

    def _exact(self, region: Window) -> Tensor:
        """As `_blended`, of tiles that agree: where one holds the region, a view into it."""
        strips: dict[int, list[Tensor]] = {}
        for tile, (y0, x0, y1, x1) in self._pieces(region):
            top, left, _, _ = self._reach(tile)
            strips.setdefault(y0, []).append(self._tile(tile)[:, :, y0 - top : y1 - top, x0 - left : x1 - left])
        rows = [parts[0] if len(parts) == 1 else torch.cat(parts, dim=3) for parts in strips.values()]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)

    def _pieces(self, region: Window) -> Iterator[tuple[Window, Window]]:
        """A region in as few pieces as tiles that agree allow: each a tile, and what it gives of the region."""
        columns = self._cover(region[1], region[3], self.cells[1])
        for y0, y1, tile_y in self._cover(region[0], region[2], self.cells[0]):
            for x0, x1, tile_x in columns:
                yield (tile_y[0], tile_x[0], tile_y[1], tile_x[1]), (y0, x0, y1, x1)

    def _cover(self, start: int, stop: int, length: int) -> list[tuple[int, int, tuple[int, int]]]:
        """[start, stop) of an axis in as few pieces as tiles allow: first and last cell + 1 of each, and its tile."""
        pieces = []
        spans = self.tiling.spans(length)
        while start < stop:
            tile = max(span for span in spans if max(0, span[0] - _MARGIN) <= start)
            end = min(stop, tile[1] + _MARGIN)
            pieces.append((start, end, tile))
            start = end
        return pieces

    def _reach(self, tile: Window) -> Window:
        """The cells of which a tile's features are kept: where tiles agree, those around it too that pixels at its
        border read."""
        margin = 0 if self.halo is None else _MARGIN
        y0, x0, y1, x1 = tile
        return (
            max(0, y0 - margin),
            max(0, x0 - margin),
            min(self.cells[0], y1 + margin),
            min(self.cells[1], x1 + margin),
        )

    def _tile(self, tile: Window) -> Tensor:
        return self._kept.get(tile, lambda: self._made_tile(tile), comes_in_rows=self._comes_in_rows)

    def _made_tile(self, tile: Window) -> Tensor:
        y0, x0, y1, x1 = self._reach(tile)
        halo = self.halo or 0
        top, left = max(0, y0 - halo), max(0, x0 - halo)
        features = self.decoder.features(self.latent[:, :, top : y1 + halo, left : x1 + halo])
        if features.shape[2:] != (y1 - y0, x1 - x0):
            features = features[:, :, y0 - top : y1 - top, x0 - left : x1 - left].clone()
        return features


def _cells(start: int, stop: int, num_pixels: int, num_cells: int) -> tuple[int, int]:
    """Cells that the ensemble of the pixels start..stop-1 reads, and at most one more at either end."""
    first = start * num_cells // num_pixels - 1
    last = -(-stop * num_cells // num_pixels) + 1
    return max(0, first), min(num_cells, last)


def _overlapping(tiles: list[Window], region: Window) -> Iterator[tuple[Window, Window]]:
    """Tiles that share cells with the region, each with what they share."""
    for tile in tiles:
        y0, x0 = max(tile[0], region[0]), max(tile[1], region[1])
        y1, x1 = min(tile[2], region[2]), min(tile[3], region[3])
        if y0 < y1 and x0 < x1:
            yield tile, (y0, x0, y1, x1)
