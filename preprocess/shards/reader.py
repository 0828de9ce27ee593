"""One open shard: any sample's members by position, without scanning the tar.

Legend: S stored channels, h/w latent grid, H/W pixels.
"""

from __future__ import annotations

import mmap
from typing import BinaryIO

import numpy as np

from pipeline.errors import UserError
from preprocess.pictures.images import decode_stored
from preprocess.shards.manifest import Manifest, ShardEntry
from preprocess.shards.receipt import Receipt
from preprocess.shards.sample import npy_header, stored_shape


class ShardReader:
    """Random access to a checked shard through a memory map. Safe for several threads."""

    def __init__(self, file: BinaryIO, receipt: Receipt, entry: ShardEntry, manifest: Manifest) -> None:
        self.name = entry.name
        if receipt["sha256"] != entry.sha256 or receipt["suffixes"] != manifest.suffixes:
            raise UserError(f"{entry.name}.json does not belong to this manifest; run preprocess again")
        self.ids: list[str] = receipt["ids"]
        self.offsets = np.asarray(receipt["offsets"], dtype=np.int64).reshape(len(self.ids), -1, 2)
        self.columns = {suffix: number for number, suffix in enumerate(manifest.suffixes)}
        self.pixel_format = manifest.pixel_format
        if manifest.latent_shape:
            self.dtype = np.dtype(manifest.dtype)
            latents = [suffix for suffix in manifest.suffixes if suffix.endswith("latent.npy")]
            self.shapes = {s: stored_shape(s, manifest.latent_shape, manifest.condition_cells) for s in latents}
            self.headers = {suffix: npy_header(manifest.dtype, shape) for suffix, shape in self.shapes.items()}
        self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def member(self, position: int, suffix: str) -> memoryview:
        """Content of one member."""
        offset, length = self.offsets[position, self.columns[suffix]]
        return memoryview(self.data)[offset : offset + length]

    def latent(self, position: int, suffix: str) -> np.ndarray:
        """A stored latent (S,h,w), a view of the file. Only the exact array that the manifest promises is accepted."""
        content = self.member(position, suffix)
        header, shape = self.headers[suffix], self.shapes[suffix]
        start = len(header)
        if content[:start] != header or len(content) != start + int(np.prod(shape)) * self.dtype.itemsize:
            raise UserError(
                f"{self.name}: {suffix} of {self.ids[position]} is not a {self.dtype} array of shape {shape}"
            )
        return np.frombuffer(content, self.dtype, offset=start).reshape(shape)

    def pixels(self, position: int) -> np.ndarray:
        """uint8 (H,W,3)."""
        return decode_stored(bytes(self.member(position, self.pixel_format)))
