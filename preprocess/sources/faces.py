"""FFHQ and CelebA-HQ: numbered faces, with the lists that papers split them by."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import sys
from collections import Counter
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import exists, join, read_bytes
from preprocess.config import PreprocessConfig
from preprocess.names import read_list
from preprocess.retry import PATIENT
from preprocess.sources.base import PlainSource, Source
from preprocess.sources.folder import FolderSource, ZipSource, open_images

FFHQ_JSON = "ffhq-dataset-v2.json"
_NUM_FFHQ_TRAIN = 60000
_RENDITIONS = ("image", "thumbnail", "in_the_wild")
_FULL_SIZE = "images1024x1024/"


def image_number(image: str) -> int | None:
    """The number in a file name such as `00012.png`, `imgHQ00012.npy` or `12.jpg`."""
    match = re.fullmatch(r"(?:imgHQ)?0*([0-9]+)", posixpath.splitext(posixpath.basename(image))[0])
    return int(match.group(1)) if match else None


class FacesSource(PlainSource):
    """A folder or zip of numbered faces. `num_train`: numbers below it are "train", the rest "val"; 0: no such split.
    Where `images1024x1024/` is among the folders, the others hold the same faces once more and are left out.

    lists: (train, val) numbers from split lists; images in neither are left out.
    facts: per id, the JSON facts that go into the sample; md5: per id, the promised checksum.
    """

    def __init__(
        self, images: FolderSource | ZipSource, num_train: int, lists: tuple[set[int], set[int]] | None
    ) -> None:
        self.images, self.num_train, self.lists = images, num_train, lists
        self.facts: dict[str, dict[str, Any]] = {}
        self.md5: dict[str, str] = {}

    def list_images(self) -> list[tuple[str, int]]:
        found = self.images.list_images()
        left_out = Counter(self.images.left_out())
        listed = [(image, size) for image, size in found if image_number(image) is not None]
        left_out["not numbered"] = len(found) - len(listed)
        if any(image.startswith(_FULL_SIZE) for image, _ in listed):
            num_numbered = len(listed)
            listed = [(image, size) for image, size in listed if image.startswith(_FULL_SIZE)]
            left_out["smaller or wilder copies"] = num_numbered - len(listed)
        if self.lists:
            both = self.lists[0] | self.lists[1]
            num_before = len(listed)
            gone = both - {image_number(image) for image, _ in listed}
            if gone:
                print(f"preprocess: {len(gone)} listed images are not in {self.images.url}: {min(gone)}, ...",
                      file=sys.stderr)  # fmt: skip
            listed = [(image, size) for image, size in listed if image_number(image) in both]
            left_out["in neither list"] = num_before - len(listed)
        self._left_out = dict(+left_out)
        if not listed:
            raise UserError(f"{self.images.url} holds no numbered images such as 00000.png")
        return listed

    def read(self, image: str) -> bytes:
        return self.images.read(image)

    def split_of(self, image: str) -> str | None:
        number = image_number(image)
        if number is None:
            return None
        if self.lists:
            return "val" if number in self.lists[1] else "train"
        if self.num_train:
            return "train" if number < self.num_train else "val"
        return None

    def aliases(self, image: str) -> list[str]:
        number = image_number(image)
        return [] if number is None else [f"imgHQ{number:05d}", f"{number:05d}", str(number)]

    def info(self, image: str) -> dict[str, Any]:
        return self.facts.get(image, {})

    def check(self, image: str, data: bytes) -> str | None:
        promised = self.md5.get(image)
        if promised is None or hashlib.md5(data, usedforsecurity=False).hexdigest() == promised:
            return None
        return f"MD5 differs from {FFHQ_JSON}; for a resized copy use --no-check-md5"


def open_ffhq(config: PreprocessConfig) -> Source:
    """`ffhq`: `--split official` (first 60 000 train, the default) or `ldm` (the lists beside the images)."""
    lists = _ldm_lists(config, "ffhqtrain.txt", "ffhqvalidation.txt", ("official", "ldm"))
    own_split = config.val_list or config.val_fraction or config.val_folder
    images = open_images(config.source_url, config.members)
    source = FacesSource(images, 0 if lists or own_split else _NUM_FFHQ_TRAIN, lists)
    _add_ffhq_facts(source, config)
    return source


def open_celebahq(config: PreprocessConfig) -> Source:
    """`celebahq`: all "train", or `--split ldm` (lists that name imgHQ00000.npy)."""
    lists = _ldm_lists(config, "celebahqtrain.txt", "celebahqvalidation.txt", ("ldm",))
    return FacesSource(open_images(config.source_url, config.members), 0, lists)


def _ldm_lists(
    config: PreprocessConfig, train: str, val: str, allowed: tuple[str, ...]
) -> tuple[set[int], set[int]] | None:
    if config.split not in ("", *allowed):
        raise UserError(f"--split {config.split} is not a split of {config.source}; use {' or '.join(allowed)}")
    if config.split != "ldm":
        return None
    folder = posixpath.dirname(config.source_url) if config.source_url.endswith(".zip") else config.source_url
    found: list[set[int]] = []
    for name in (train, val):
        url = join(folder, name)
        if not exists(url, retries=PATIENT):
            raise UserError(f"--split ldm needs {url}; put the list there, or give --train-list and --val-list")
        found.append(set())
        for line, text in read_list(url):
            number = image_number(text.strip().replace("\\", "/"))
            if number is None:
                raise UserError(f"{url}, line {line}: {text.strip()!r} is not a numbered image such as 00000.png")
            found[-1].add(number)
    if found[0] & found[1]:
        raise UserError(f"{train} and {val} both name image {min(found[0] & found[1])}; the lists are mixed up")
    return found[0], found[1]


def _add_ffhq_facts(source: FacesSource, config: PreprocessConfig) -> None:
    """Licence, author and MD5 from the data set's JSON, when it lies in or beside the source."""
    folder = posixpath.dirname(config.source_url.rstrip("/"))
    urls = [join(url, FFHQ_JSON) for url in (config.source_url.rstrip("/"), folder) if url and not url.endswith(".zip")]
    url = next((url for url in urls if exists(url, retries=PATIENT)), None)
    if url is None:
        return
    records = _Records(url)
    base = posixpath.basename(config.source_url.rstrip("/"))
    for image, _ in source.list_images():
        found = records.find(image, base)
        if found:
            metadata, md5 = found
            source.facts[image] = {
                name: metadata[key]
                for name, key in (("licence", "license"), ("author", "author"), ("url", "photo_url"))
                if metadata.get(key)
            }
            if config.check_md5:
                source.md5[image] = md5


class _Records:
    """(metadata, MD5) of each rendition in FFHQ's JSON, by its path, and of the full-size images also by number."""

    def __init__(self, url: str) -> None:
        try:
            records = json.loads(read_bytes(url, retries=PATIENT))
            self.by_path = {
                record[name]["file_path"]: (record["metadata"], record[name]["file_md5"])
                for record in records.values()
                for name in _RENDITIONS
                if name in record
            }
            self.by_number = {
                int(number): (record["metadata"], record["image"]["file_md5"])
                for number, record in records.items()
                if "image" in record
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{url} is not FFHQ's JSON ({type(error).__name__}: {error})") from error

    def find(self, image: str, base: str) -> tuple[dict[str, Any], str] | None:
        """What is known of an image of a source whose folder is called `base`, in the official layout or any other."""
        number = image_number(image)
        return (
            self.by_path.get(image)
            or self.by_path.get(f"{base}/{image}")
            or (self.by_number.get(number) if number is not None else None)
        )
