"""Any images in a folder and its sub-folders, on any file system that fsspec speaks, or in a zip file.

Id: the path within the folder or zip.
"""

from __future__ import annotations

import lzma
import threading
import zipfile
import zlib
from typing import Any

from pipeline.errors import UserError, first_line
from pipeline.storage import filesystem, reaching
from preprocess.config import PreprocessConfig
from preprocess.rejects import Reject
from preprocess.sources.base import PlainSource, suffixes_for
from preprocess.sources.listing import Listing, choose, is_archive, is_folder, kind_left_out, list_folder

_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What reading a damaged, encrypted or exotic member of a zip raises."""


class FolderSource(PlainSource):
    """Images by suffix, recursively. members: extensions to take, by default all."""

    def __init__(self, url: str, suffixes: tuple[str, ...] | None = None, members: tuple[str, ...] = ()) -> None:
        self.url, self.suffixes, self.members = url, suffixes or suffixes_for(members), members

    def list_images(self) -> list[tuple[str, int]]:
        return self._take(choose(list_folder(self.url, self.suffixes), self.members, is_tar=False), self.url)

    def read(self, image: str) -> bytes:
        fs, root = filesystem(self.url)
        with reaching(self.url):
            return bytes(fs.cat_file(f"{root.rstrip('/')}/{image}"))


class ZipSource(PlainSource):
    """Images in a zip file, read in place: nothing is unpacked, so no member can write anywhere."""

    def __init__(self, url: str, members: tuple[str, ...] = ()) -> None:
        self.url, self.members = url, members
        self._zip: zipfile.ZipFile | None = None
        self._lock = threading.Lock()

    def list_images(self) -> list[tuple[str, int]]:
        listing = Listing()
        for info in self._open().infolist():
            if info.filename.startswith("/") or ".." in info.filename.split("/"):
                raise UserError(f"{self.url}: member {info.filename!r} points outside the archive; refusing the file")
            if info.is_dir():
                continue
            if kind := kind_left_out(info.filename, suffixes_for(self.members)):
                listing.left_out[kind] += 1
            else:
                listing.images.append((info.filename, info.file_size))
        return self._take(choose(listing, self.members, is_tar=False), self.url)

    def read(self, image: str) -> bytes:
        try:
            with reaching(self.url):
                return self._open().read(image)
        except KeyError as error:
            raise FileNotFoundError(image) from error
        except _DAMAGE as error:
            raise Reject("damaged", f"zip member: {first_line(error)}") from error
        except OSError as error:  # bzip2's word for damage has no error number; the system's and a store's have
            if error.errno is not None or error.__cause__ is not None:
                raise
            raise Reject("damaged", f"zip member: {first_line(error)}") from error

    def _open(self) -> zipfile.ZipFile:
        with self._lock:
            if self._zip is None:
                fs, path = filesystem(self.url)
                try:
                    self._zip = zipfile.ZipFile(fs.open(path, "rb"))
                except (zipfile.BadZipFile, FileNotFoundError, NotImplementedError, ValueError, EOFError) as error:
                    raise UserError(f"{self.url} is not a readable zip file: {first_line(error)}") from error
            return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], state["members"])  # type: ignore[misc]


def open_images(url: str, members: tuple[str, ...] = ()) -> FolderSource | ZipSource:
    """A folder, or a zip file, of images."""
    return ZipSource(url, members) if is_archive(url) and not is_folder(url) else FolderSource(url, members=members)


def open_folder(config: PreprocessConfig) -> FolderSource | ZipSource:
    """`folder`: any images, recursive."""
    return open_images(config.source_url, config.members)
