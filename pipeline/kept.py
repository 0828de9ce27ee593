"""What a long work has reached, kept on disk piece by piece, so that the same work goes on after a stop.

A piece is what a network gave for one tile. Pieces have names; everything that leads from pieces to the result is
computed again, which costs little and gives the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.sizes import Window

Draw = Callable[[Window], NDArray[np.uint8]]
Keep = Callable[[str, Callable[[], Tensor]], Tensor]
"""(name of a piece, what makes it) → the piece, from disk where it was made before."""


def keep_nothing(name: str, make: Callable[[], Tensor]) -> Tensor:
    return make()


class KeptPieces:
    """A folder of pieces of the work that `key` describes; pieces of another work in it are dropped. `num_found` counts
    those that were there, `num_made` those that were added. A full disk or a folder without permission keeps nothing
    and stops nothing."""

    def __init__(self, folder: Path, key: Mapping[str, str]) -> None:
        self.folder, self.num_found, self.num_made = folder, 0, 0
        self._is_usable = True
        text = json.dumps(dict(key), sort_keys=True)
        try:
            if not (folder / "work.json").is_file() or (folder / "work.json").read_text() != text:
                drop(folder)
                folder.mkdir(parents=True, exist_ok=True)
                self._is_usable = not any(folder.iterdir())  # or it is somebody else's
                if self._is_usable:
                    (folder / "work.json").write_text(text)
        except OSError:
            self._is_usable = False

    def __call__(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        file = self._file(name)
        if self._is_usable and file.is_file():
            with contextlib.suppress(OSError, SafetensorError, KeyError):
                piece = load_file(file)["piece"]
                self.num_found += 1
                return piece
        piece = make()
        if self._is_usable:
            self._store(file, piece)
        return piece

    def has(self, name: str) -> bool:
        return self._is_usable and self._file(name).is_file()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _store(self, file: Path, piece: Tensor) -> None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            save_file({"piece": piece.detach().cpu().contiguous()}, temporary)
            temporary.replace(file)
            self.num_made += 1
        except (OSError, SafetensorError):
            self._is_usable = False
            with contextlib.suppress(OSError):
                temporary.unlink()

    def remove(self) -> None:
        """The work is done."""
        drop(self.folder)


def drop(folder: Path) -> None:
    """Remove what was kept in a folder, if that is what it holds."""
    if (folder / "work.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)


def keep_pixels(keep: Keep, draw: Draw) -> Draw:
    """A function of windows whose pixels are kept as pieces."""

    def kept(window: Window) -> NDArray[np.uint8]:
        name = "window-" + "-".join(map(str, window))
        return keep(name, lambda: torch.from_numpy(np.ascontiguousarray(draw(window)))).numpy()

    return kept
