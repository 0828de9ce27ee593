"""The samples of a finished shard set as a source: their stored pixels are encoded anew, by another encoder."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import filesystem, join, reaching
from preprocess.config import PreprocessConfig
from preprocess.shards.manifest import Manifest, folder_of, load_manifest
from preprocess.shards.receipt import load_receipt
from preprocess.sources.base import PlainSource

_NUM_THREADS = 4


class ShardSource(PlainSource):
    """Ids, splits and facts (with the hash of the very first source) are those of the set."""

    def __init__(self, url: str) -> None:
        self.url = folder_of(url)
        self.manifest: Manifest = load_manifest(url)
        self.places: dict[str, tuple[str, int, int, int, int]] = {}  # id → (shard, pixels at, length, JSON at, length)
        self.splits: dict[str, str] = {entry.name: entry.split for entry in self.manifest.shards}

    def list_images(self) -> list[tuple[str, int]]:
        columns = [self.manifest.suffixes.index(name) for name in (self.manifest.pixel_format, "json")]
        names = [entry.name for entry in self.manifest.shards]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for name, receipt in zip(names, pool.map(lambda name: load_receipt(self.url, name), names)):
                for sample, row in zip(receipt["ids"], receipt["offsets"]):
                    (pixels, num_pixels), (info, num_info) = (row[2 * c : 2 * c + 2] for c in columns)
                    self.places[sample] = (name, pixels, num_pixels, info, num_info)
        return [(sample, place[2]) for sample, place in self.places.items()]

    def read(self, image: str) -> bytes:
        name, start, length, _, _ = self.places[image]
        return self._range(name, start, length)

    def split_of(self, image: str) -> str | None:
        return self.splits[self.places[image][0]]

    def info(self, image: str) -> dict[str, Any]:
        name, _, _, start, length = self.places[image]
        info: dict[str, Any] = json.loads(self._range(name, start, length))
        return {key: value for key, value in info.items() if key != "flip"}

    def _range(self, name: str, start: int, length: int) -> bytes:
        url = join(self.url, name + ".tar")
        fs, path = filesystem(url)
        with reaching(url):
            return bytes(fs.cat_file(path, start=start, end=start + length))


def open_shards(config: PreprocessConfig) -> ShardSource:
    """`shards`: the samples of a finished set."""
    source = ShardSource(config.source_url)
    found = source.manifest
    if (config.size, config.pixel_format) != (found.size, found.pixel_format):
        raise UserError(
            f"{config.source_url} holds {found.pixel_format} of {found.size}x{found.size}; "
            f"use --size {found.size} --pixel-format {found.pixel_format}, or preprocess reencode"
        )
    return source
