"""Finished chunks of an evaluation as files, and all of them as one mapping that reads an array when it is asked for.

50 000 samples' features of one network and one size are some hundred megabytes; those of all sizes need not be in
memory together. Legend: keys as in chunk.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline import storage
from training.evaluation.chunk import Arrays

Chunk = tuple[int, int]
"""First sample and one past the last."""


class ChunkStore(Mapping[str, np.ndarray]):
    """Chunks under `folder` (path or URL), each one file, published atomically.

    As a mapping: key → the array of all `chunks` in sample order, read anew at each access; of the pictures, which one
    chunk holds, that one. Files of a remote folder are copied once to `scratch`, a local folder.
    """

    def __init__(self, folder: str, chunks: list[Chunk], scratch: str | Path) -> None:
        self.folder, self.chunks, self.scratch = folder, chunks, Path(scratch)
        self._holders: dict[str, list[Path]] = {}

    def missing(self) -> list[Chunk]:
        """Chunks that are still to be computed."""
        finished = set(storage.list_files(self.folder))
        return [chunk for chunk in self.chunks if _name(chunk) not in finished]

    def write(self, chunk: Chunk, arrays: Arrays) -> None:
        """Publish one chunk."""
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        storage.write_bytes(storage.join(self.folder, _name(chunk)), buffer.getvalue())

    def open(self) -> None:
        """Find out what the chunks hold; call it when none is missing."""
        local = storage.fetch_dir(self.folder, self.scratch)
        self._holders = {}
        for chunk in self.chunks:
            path = local / _name(chunk)
            with np.load(path, allow_pickle=False) as file:
                for key in file.files:
                    self._holders.setdefault(key, []).append(path)

    def __getitem__(self, key: str) -> np.ndarray:
        parts = []
        for path in self._holders[key]:
            with np.load(path, allow_pickle=False) as file:
                parts.append(file[key])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


def _name(chunk: Chunk) -> str:
    return f"{chunk[0]:08d}-{chunk[1]:08d}.npz"
