"""Shards at hand for reading: local ones where they lie, remote ones in a bounded folder, each checked on first use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.storage import filesystem, is_local, join
from preprocess.retry import RetryCounter, with_retries
from preprocess.shards.manifest import ShardEntry

_CHUNK = 4 << 20


def default_cache_dir() -> Path:
    """One folder per user in the system's temporary place."""
    return Path(tempfile.gettempdir()) / f"latentzoom-shards-{os.getuid()}"


class ShardCache:
    """Local paths of the shards of one set. Remote shards are named by their hash, so processes can share the folder,
    and one of them fetches a shard while the others wait for it; the longest unused go first when `max_bytes` is passed
    (files in use stay readable: the system keeps them)."""

    def __init__(self, url: str, cache_dir: str | None, max_bytes: int, retries: int = 6) -> None:
        self.url, self.retries, self.max_bytes = url, retries, max_bytes
        self.local = is_local(url)
        self.folder = Path(cache_dir) if cache_dir else default_cache_dir()
        self.counter = RetryCounter()
        self._checked: set[str] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def close(self) -> None:
        """Give up what is being fetched: it raises `UserError`."""
        self._closed.set()

    def open(self, entry: ShardEntry) -> BinaryIO:
        """An open local file with the content that the manifest promises, which stays readable when the cache drops it.
        Damage raises `UserError` naming the shard."""
        if self.local:
            path = Path(filesystem(join(self.url, entry.name + ".tar"))[1])
            self._check(path, entry)
            return path.open("rb")
        path = self.folder / f"{entry.sha256}.tar"
        if (at_hand := self._at_hand(path, entry)) is not None:
            return at_hand
        with self._alone(path):
            if (at_hand := self._at_hand(path, entry)) is not None:  # another process has fetched it meanwhile
                return at_hand
            what = f"reading {entry.name}.tar"
            file: BinaryIO = with_retries(lambda: self._download(entry, path), what, self.retries, self.counter)
            with self._lock:
                self._checked.add(entry.name)
                self._evict(path)
            return file

    def _at_hand(self, path: Path, entry: ShardEntry) -> BinaryIO | None:
        """The cached file, sound and open; None where it was never fetched, is damaged or was dropped meanwhile."""
        with contextlib.suppress(UserError, FileNotFoundError):
            self._check(path, entry)
            os.utime(path)
            return path.open("rb")
        return None

    @contextlib.contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Wait for whoever on this machine fetches the same file. A process that dies gives its lock back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(cancel_check=self._closed.is_set)
        except Timeout as error:
            raise UserError(f"reading {path.name} was given up: its loader was closed") from error
        try:
            yield
        finally:
            lock.release()

    def _check(self, path: Path, entry: ShardEntry) -> None:
        if entry.name in self._checked:
            return
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError as error:
            raise UserError(f"{self.url}/{entry.name}.tar is missing; run preprocess again to rebuild it") from error
        if found != entry.sha256:
            raise UserError(f"{path} is damaged (checksum); run preprocess again to rebuild it")
        with self._lock:
            self._checked.add(entry.name)

    def _download(self, entry: ShardEntry, path: Path) -> BinaryIO:
        fs, remote = filesystem(join(self.url, entry.name + ".tar"))
        digest = hashlib.sha256()
        handle, temporary = tempfile.mkstemp(prefix=".download-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as target, fs.open(remote, "rb", block_size=_CHUNK) as source:
                while chunk := source.read(_CHUNK):
                    if self._closed.is_set():
                        raise UserError(f"reading {entry.name}.tar was given up: its loader was closed")
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != entry.sha256:
                raise UserError(f"{self.url}/{entry.name}.tar is damaged (checksum); run preprocess again")
            file = Path(temporary).open("rb")  # noqa: SIM115 - opened before others can drop it
            Path(temporary).replace(path)
            return file
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        files = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size
