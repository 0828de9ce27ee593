"""Features of tiles, kept while there is room, each made once whoever asks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

from pipeline.sizes import Window


class FeatureCache:
    """Tensors by tile, at most `max_bytes` of them (but always the last one). For several threads: one that asks for
    what another one makes waits for it; different tiles are made at the same time. num_bytes: of what is kept, to be
    read at any moment without waiting."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[Window, Tensor] = OrderedDict()
        self._making: dict[Window, Future[Tensor]] = {}
        self._lock = threading.Lock()

    def __contains__(self, tile: Window) -> bool:
        with self._lock:
            return tile in self._kept

    def get(self, tile: Window, make: Callable[[], Tensor], *, comes_in_rows: bool = False) -> Tensor:
        """What `make` gave for a tile. comes_in_rows: tiles are asked for in order, row by row, and what lies before
        this one is not asked for again; else what was used longest ago is let go of first."""
        with self._lock:
            if (kept := self._kept.get(tile)) is not None:
                self._kept.move_to_end(tile)
                return kept
            theirs = self._making.get(tile)
            if theirs is None:
                mine = self._making[tile] = Future()
        if theirs is not None:
            return theirs.result()
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._making[tile]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._making[tile]
            self._keep(tile, made, comes_in_rows)
        mine.set_result(made)
        return made

    def _keep(self, tile: Window, made: Tensor, comes_in_rows: bool) -> None:
        while self._kept and self.num_bytes + num_bytes(made) > self.max_bytes:
            first, oldest = min(self._kept), next(iter(self._kept))
            self.num_bytes -= num_bytes(self._kept.pop(first if comes_in_rows and first < tile else oldest))
        self._kept[tile] = made
        self.num_bytes += num_bytes(made)


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
