"""DIV2K, Flickr2K and both together (DF2K): high-resolution photographs, cropped at full resolution."""

from __future__ import annotations

import posixpath
import re
from collections import Counter

from pipeline.errors import UserError
from preprocess.config import PreprocessConfig
from preprocess.sources.base import PlainSource, Source
from preprocess.sources.folder import FolderSource, ZipSource, open_images

_DIV2K_NAME = re.compile(r"0[0-9]{3}\.png")
_FLICKR2K_NAME = re.compile(r"[0-9]{6}\.png")
_NUM_DIV2K_TRAIN, _NUM_DIV2K = 800, 900


class RestorationSource(PlainSource):
    """High-resolution images by name; reduced copies (folders with `_LR`) are left out."""

    def __init__(self, images: FolderSource | ZipSource, kinds: tuple[str, ...], split: str) -> None:
        self.images, self.kinds, self.split = images, kinds, split

    def list_images(self) -> list[tuple[str, int]]:
        found = self.images.list_images()
        kinds = [(image, size, self._why_not(image)) for image, size in found]
        listed = [(image, size) for image, size, kind in kinds if not kind]
        self._left_out = dict(Counter(self.images.left_out()) + Counter(kind for _, _, kind in kinds if kind))
        if not listed:
            expected = {"div2k": "0001.png to 0900.png", "flickr2k": "000001.png to 002650.png"}
            names = " or ".join(expected[kind] for kind in self.kinds)
            raise UserError(f"{self.images.url} holds no {names} outside low-resolution (_LR) folders")
        return listed

    def _why_not(self, image: str) -> str:
        name, folder = posixpath.basename(image), posixpath.dirname(image)
        if "_LR" in folder:
            return "in low-resolution folders"
        is_div2k = bool(_DIV2K_NAME.fullmatch(name)) and 1 <= int(name[:4]) <= _NUM_DIV2K
        is_flickr2k = bool(_FLICKR2K_NAME.fullmatch(name))
        if not (("div2k" in self.kinds and is_div2k) or ("flickr2k" in self.kinds and is_flickr2k)):
            return "of other names"
        return "of other splits" if self.split and self.split_of(image) != self.split else ""

    def read(self, image: str) -> bytes:
        return self.images.read(image)

    def split_of(self, image: str) -> str | None:
        name = posixpath.basename(image)
        if _DIV2K_NAME.fullmatch(name):
            return "train" if int(name[:4]) <= _NUM_DIV2K_TRAIN else "val"
        return "train"


def _open(config: PreprocessConfig, *kinds: str) -> Source:
    if config.split not in ("", "train", "val"):
        raise UserError(f"--split {config.split} is not a split of {config.source}; use train or val, or leave it out")
    return RestorationSource(open_images(config.source_url, config.members), kinds, config.split)


def open_div2k(config: PreprocessConfig) -> Source:
    """`div2k`: 0001-0800 are "train", 0801-0900 "val"."""
    return _open(config, "div2k")


def open_flickr2k(config: PreprocessConfig) -> Source:
    """`flickr2k`: all "train"."""
    return _open(config, "flickr2k")


def open_df2k(config: PreprocessConfig) -> Source:
    """`df2k`: one folder that holds both."""
    return _open(config, "div2k", "flickr2k")
