"""Any images in a folder and its sub-folders, on any file system that fsspec speaks, or in a zip file.

Id: the path within the folder or zip.
"""

from __future__ import annotations

import threading
import zipfile
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import filesystem
from preprocess.config import PreprocessConfig
from preprocess.sources.base import IMAGE_SUFFIXES, PlainSource


def is_image_name(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """By suffix; hidden files, and what macOS adds to archives, are not images."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return name.lower().endswith(suffixes) and not hidden


class FolderSource(PlainSource):
    """Images by suffix, recursively."""

    def __init__(self, url: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> None:
        self.url = url
        self.suffixes = suffixes

    def list_images(self) -> list[tuple[str, int]]:
        fs, root = filesystem(self.url)
        root = root.rstrip("/")
        if not fs.isdir(root):
            raise UserError(f"{self.url} is not a folder; give the folder that holds the images")
        found = []
        for path, detail in fs.find(root, detail=True).items():
            name = str(path)[len(root) + 1 :]
            if is_image_name(name, self.suffixes):
                found.append((name, int(detail.get("size") or 0)))
        if not found:
            raise UserError(f"{self.url} holds no images ({', '.join(self.suffixes)})")
        return found

    def read(self, image: str) -> bytes:
        fs, root = filesystem(self.url)
        return bytes(fs.cat_file(f"{root.rstrip('/')}/{image}"))


class ZipSource(PlainSource):
    """Images in a zip file, read in place: nothing is unpacked, so no member can write anywhere."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._zip: zipfile.ZipFile | None = None
        self._lock = threading.Lock()

    def list_images(self) -> list[tuple[str, int]]:
        infos = [info for info in self._open().infolist() if not info.is_dir() and is_image_name(info.filename)]
        for info in self._open().infolist():
            if info.filename.startswith("/") or ".." in info.filename.split("/"):
                raise UserError(f"{self.url}: member {info.filename!r} points outside the archive; refusing the file")
        if not infos:
            raise UserError(f"{self.url} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        return [(info.filename, info.file_size) for info in infos]

    def read(self, image: str) -> bytes:
        try:
            return self._open().read(image)
        except KeyError as error:
            raise FileNotFoundError(image) from error
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, exotic or encrypted member
            raise UserError(f"{self.url}: cannot read {image}: {error}") from error

    def _open(self) -> zipfile.ZipFile:
        with self._lock:
            if self._zip is None:
                fs, path = filesystem(self.url)
                try:
                    self._zip = zipfile.ZipFile(fs.open(path, "rb"))
                except (zipfile.BadZipFile, FileNotFoundError) as error:
                    raise UserError(f"{self.url} is not a readable zip file: {error}") from error
            return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])  # type: ignore[misc]


def open_images(url: str) -> FolderSource | ZipSource:
    """A folder, or a zip file, of images."""
    return ZipSource(url) if url.lower().endswith(".zip") else FolderSource(url)


def open_folder(config: PreprocessConfig) -> FolderSource | ZipSource:
    """`folder`: any images, recursive."""
    return open_images(config.source_url)
