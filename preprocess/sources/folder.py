"""Any images in a folder and its sub-folders, on any file system that fsspec speaks. Id: the path in the folder."""

from __future__ import annotations

from pathlib import PurePosixPath

from pipeline.errors import UserError
from pipeline.storage import filesystem
from preprocess.config import PreprocessConfig
from preprocess.sources.base import IMAGE_SUFFIXES, PlainSource


class FolderSource(PlainSource):
    """Images by suffix, recursively; hidden files and folders are not images."""

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
            if self._is_image(name):
                found.append((name, int(detail.get("size") or 0)))
        if not found:
            raise UserError(f"{self.url} holds no images ({', '.join(self.suffixes)})")
        return found

    def _is_image(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        return name.lower().endswith(self.suffixes) and not any(part.startswith(".") for part in parts)

    def read(self, image: str) -> bytes:
        fs, root = filesystem(self.url)
        return bytes(fs.cat_file(f"{root.rstrip('/')}/{image}"))


def open_folder(config: PreprocessConfig) -> FolderSource:
    """`folder`: any images, recursive."""
    return FolderSource(config.source_url)
