"""What was given to a server, on disk: picture files and recipes of generated ones, so that nothing is lost when it is
killed. Each lies in a folder of its own, complete or absent, under an id that nobody guesses, until it expires."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.sizes import Size

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
"""128 bits, in the URL-safe alphabet."""


MAX_ENTRIES = 20_000
"""Pictures that are kept: recipes take no bytes to speak of, but a folder each."""
_PART, _PART_SECONDS = ".part-", 600.0
"""What is being written, by this server or by another one with the same folder; older ones are a killed server's."""


class Full(UserError):
    """No room for more."""


class NotThere(UserError):
    """No such picture: never there, removed, or expired."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One picture. size: its own (H, W), of a file after it was shrunk by `shrink`. recipe: how a generated one is made
    (seed, latent_size, steps); {} for a file. sha256: of the file, or of the recipe."""

    id: str
    name: str
    size: Size
    sha256: str
    model: str = ""
    shrink: int = 1
    recipe: dict[str, Any]


class Shelf:
    """Entries in a folder. max_bytes: of all files; seconds: until an entry that nobody asks for expires."""

    def __init__(self, folder: Path, *, max_bytes: int, seconds: float) -> None:
        self.folder, self.max_bytes, self.seconds = folder, max_bytes, seconds
        self._lock = threading.Lock()
        self._num = self._bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            trial = folder / f"{_PART}{_new_id()}"
            trial.mkdir()
            trial.rmdir()
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror or error}; give another --keep") from error
        self.sweep()

    def add_file(self, data: bytes, name: str, size: Size, *, model: str = "", shrink: int = 1) -> Entry:
        """Store a picture file. Raises `UserError` where the shelf is full."""
        digest = storage.sha256_bytes(data)
        entry = Entry(id=_new_id(), name=name, size=size, sha256=digest, model=model, shrink=shrink, recipe={})
        return self._add(entry, data)

    def add_recipe(self, recipe: dict[str, Any], name: str, size: Size, model: str) -> Entry:
        """Store how a picture is generated."""
        digest = storage.sha256_bytes(json.dumps(recipe, sort_keys=True).encode())
        return self._add(Entry(id=_new_id(), name=name, size=size, sha256=digest, model=model, recipe=recipe), b"")

    def get(self, ident: str) -> Entry:
        """The entry of an id, which lives on from now. Raises `NotThere`."""
        folder = self._place(ident)
        try:
            raw = json.loads((folder / "entry.json").read_text())
        except (OSError, ValueError) as error:
            raise NotThere(f"there is no picture {ident}: it expired, was removed, or was never here") from error
        with contextlib.suppress(OSError):  # it can be seen still where nothing can be written any more
            os.utime(folder)
        return Entry(**{**raw, "size": tuple(raw["size"])})

    def data(self, entry: Entry) -> bytes:
        """The picture file of an entry. Raises `NotThere`."""
        try:
            return (self._place(entry.id) / "picture").read_bytes()
        except OSError as error:
            raise NotThere(f"there is no picture {entry.id} any more") from error

    def latent(self, entry: Entry, model: str) -> bytes | None:
        """What `keep_latent` kept under a model's exact name."""
        try:
            return self._latent_file(entry, model).read_bytes()
        except OSError:
            return None

    def keep_latent(self, entry: Entry, model: str, data: bytes) -> None:
        """Keep it beside the picture, unless one is there already or there is no room."""
        file = self._latent_file(entry, model)
        part = file.with_name(f"{_PART}{_new_id()}")
        if self._is_full(len(data)):
            return
        with contextlib.suppress(OSError):  # removed meanwhile, or full
            try:
                part.write_bytes(data)
                os.link(part, file)  # the first one stays: others draw from it already
                with self._lock:
                    self._bytes += len(data)
            finally:
                part.unlink(missing_ok=True)

    def _latent_file(self, entry: Entry, model: str) -> Path:
        return self._place(entry.id) / f"latent-{storage.sha256_bytes(model.encode())[:16]}"

    def remove(self, ident: str) -> None:
        """Raises `NotThere`."""
        self.get(ident)
        with self._lock:
            self._num, self._bytes = self._num - 1, self._bytes - _bytes_of(self._place(ident))
        shutil.rmtree(self._place(ident), ignore_errors=True)

    def sweep(self) -> list[str]:
        """Remove what has expired, and what a killed server left half-written → the ids that are gone. Counts what is
        left, also of other servers with the same folder."""
        gone, num, size = [], 0, 0
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):
                is_part = folder.name.startswith(_PART)
                if folder.name.startswith(".") and not is_part:
                    continue  # of renderings
                most = min(self.seconds, _PART_SECONDS) if is_part else self.seconds
                if time.time() - folder.stat().st_mtime > most:
                    shutil.rmtree(folder, ignore_errors=True)
                    gone.append(folder.name)
                elif not is_part:
                    num, size = num + 1, size + _bytes_of(folder)
        with self._lock:
            self._num, self._bytes = num, size
        return gone

    def num_bytes(self) -> int:
        """Of all picture files."""
        return self._bytes

    def _is_full(self, more: int) -> bool:
        with self._lock:
            return self._num >= MAX_ENTRIES or self._bytes + more > self.max_bytes

    def _add(self, entry: Entry, data: bytes) -> Entry:
        if self._is_full(len(data)):
            self.sweep()
            if self._is_full(len(data)):
                raise Full(
                    f"this server keeps at most {self.max_bytes >> 20} MiB and {MAX_ENTRIES} pictures; try again later"
                )
        part = self.folder / f"{_PART}{entry.id}"
        try:
            part.mkdir(mode=0o700)
            if data:
                (part / "picture").write_bytes(data)
            (part / "entry.json").write_text(json.dumps(asdict(entry)))
            part.rename(self.folder / entry.id)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise Full(f"the picture cannot be kept here: {error.strerror or error}") from error
        with self._lock:
            self._num, self._bytes = self._num + 1, self._bytes + len(data)
        return entry

    def _place(self, ident: str) -> Path:
        if not _ID.fullmatch(ident):
            raise NotThere(f"{ident[:40]!r} is no picture's id")
        return self.folder / ident


def _bytes_of(folder: Path) -> int:
    try:
        files = [file for file in folder.iterdir() if file.name == "picture" or file.name.startswith("latent-")]
        return sum(file.stat().st_size for file in files)
    except OSError:  # it is just being removed
        return 0


def _new_id() -> str:
    return secrets.token_urlsafe(16)
