"""LSUN: LMDB databases read directly, or the folder that the official exporter writes.

Keys are 40 hexadecimal digits, values encoded images (JPEG or WebP; some are empty and are rejected as such).
"""

from __future__ import annotations

import re
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.storage import exists, filesystem, is_local, join
from preprocess.config import PreprocessConfig
from preprocess.sources.base import PlainSource, Source
from preprocess.sources.folder import FolderSource

if TYPE_CHECKING:
    import lmdb

_DATABASE = re.compile(r"(.+)_(train|val|test)_lmdb")
# LMDB must not be opened twice in one process, so open databases are shared by path.
_open_databases: dict[str, lmdb.Environment] = {}
_open_lock = threading.Lock()


def open_database(path: str) -> lmdb.Environment:
    """A read-only database, opened once in this process and never locked (it may lie on read-only storage)."""
    import lmdb

    with _open_lock:
        if path not in _open_databases:
            _check_whole(path)
            try:
                _open_databases[path] = lmdb.open(
                    path, readonly=True, lock=False, readahead=False, meminit=False, max_readers=256
                )
            except lmdb.Error as error:
                raise UserError(f"{path} is not a readable LMDB database: {error}") from error
        return _open_databases[path]


_PAGE_HEADER, _MAGIC = 16, 0xBEEFC0DE
_META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")
"""MDB_meta of lmdb.h: magic, version, address, map size, two databases (the first begins with the page size), the last
page in use, and the transaction."""


def _check_whole(path: str) -> None:
    """Raise `UserError` where a database's file ends before the last page that its newer meta page counts: LMDB maps
    the file, and touching a page that is not there kills the process."""
    file_path = Path(path) / "data.mdb" if Path(path).is_dir() else Path(path)
    try:
        size = file_path.stat().st_size
        with open(file_path, "rb") as file:
            head = file.read(1 << 17)
    except OSError as error:
        raise UserError(f"{file_path} cannot be read: {error.strerror}") from error
    if len(head) < _PAGE_HEADER + _META.size:
        raise UserError(f"{file_path} has {size} bytes and is no LMDB database; copy it again")
    first = _META.unpack_from(head, _PAGE_HEADER)
    page_size = first[4]
    if first[0] != _MAGIC or not 256 <= page_size <= 1 << 16 or len(head) < page_size + _PAGE_HEADER + _META.size:
        raise UserError(f"{file_path} is no LMDB database of this machine's kind, or was cut; copy it again")
    second = _META.unpack_from(head, page_size + _PAGE_HEADER)
    newest = max((meta for meta in (first, second) if meta[0] == _MAGIC), key=lambda meta: int(meta[-1]))
    needed = (newest[-2] + 1) * page_size
    if size < needed:
        raise UserError(f"{file_path} has {size} bytes of {needed}: it was cut; copy it again")


class LsunSource(PlainSource):
    """One or two databases. Ids: the key alone, or `train/KEY` and `val/KEY` when both splits are read."""

    def __init__(self, databases: dict[str, str]) -> None:
        self.databases = databases  # split → folder with data.mdb
        self.prefixed = len(databases) > 1

    def list_images(self) -> list[tuple[str, int]]:
        import lmdb

        listed = []
        for split, path in self.databases.items():
            try:
                with open_database(path).begin(buffers=True) as transaction:
                    for key, value in transaction.cursor():
                        name = bytes(key).decode("ascii")
                        listed.append((f"{split}/{name}" if self.prefixed else name, len(value)))
            except (lmdb.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path} is not an LSUN database: {error}") from error
        if not listed:
            raise UserError(f"{', '.join(self.databases.values())} holds no images")
        return listed

    def read(self, image: str) -> bytes:
        split, key = image.split("/", 1) if self.prefixed else (next(iter(self.databases)), image)
        with open_database(self.databases[split]).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise FileNotFoundError(image)
        return bytes(value)

    def split_of(self, image: str) -> str | None:
        split = image.split("/", 1)[0] if self.prefixed else next(iter(self.databases))
        return "train" if split == "train" else "val"


def open_lsun(config: PreprocessConfig) -> Source:
    """`lsun`: SOURCE is a database, a folder holding `CATEGORY_train_lmdb` (and `_val_lmdb`), or an exported folder."""
    url = config.source_url.rstrip("/")
    databases = _databases(url)
    if not databases:
        if config.split:
            raise UserError(
                f"--split {config.split}: an exported folder has no splits; use --val-list or --val-fraction"
            )
        return FolderSource(url, members=config.members)
    if not is_local(url):
        raise UserError(f"{url}: an LMDB database must be on a local disk; copy it there, or use the exported folder")
    if config.split:
        if config.split not in databases:
            raise UserError(f"--split {config.split}: {url} has only {', '.join(databases)}")
        databases = {config.split: databases[config.split]}
    return LsunSource(databases)


def _databases(url: str) -> dict[str, str]:
    """split → local path of each database at `url`."""
    if exists(join(url, "data.mdb")):
        match = _DATABASE.fullmatch(url.rsplit("/", 1)[-1])
        return {match.group(2) if match else "train": filesystem(url)[1]}
    fs, root = filesystem(url)
    if not fs.isdir(root):
        raise UserError(f"{url} is neither an LSUN database nor a folder")
    names = sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(root, detail=False))
    matches = [match for name in names if (match := _DATABASE.fullmatch(name))]
    categories = sorted({match.group(1) for match in matches})
    if len(categories) > 1:
        raise UserError(f"{url} holds several categories ({', '.join(categories)}); name one database, or link one")
    return {match.group(2): str(Path(root) / match.group(0)) for match in matches}
