"""What was given to a server, on disk: picture files and recipes of generated ones, so that nothing is lost when it is
killed. Each lies in a folder of its own, complete or absent, under an id that nobody guesses, until it expires."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.sizes import Size

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
"""128 bits, in the URL-safe alphabet."""


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
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror or error}; give another --keep folder") from error
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
            os.utime(folder)
        except (OSError, ValueError) as error:
            raise NotThere(f"there is no picture {ident}: it expired, was removed, or was never here") from error
        return Entry(**{**raw, "size": tuple(raw["size"])})

    def data(self, entry: Entry) -> bytes:
        """The picture file of an entry. Raises `NotThere`."""
        try:
            return (self._place(entry.id) / "picture").read_bytes()
        except OSError as error:
            raise NotThere(f"there is no picture {entry.id} any more") from error

    def remove(self, ident: str) -> None:
        """Raises `NotThere`."""
        self.get(ident)
        shutil.rmtree(self._place(ident), ignore_errors=True)

    def sweep(self) -> list[str]:
        """Remove what has expired, and what a killed server left half-written → the ids that are gone."""
        gone = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > self.seconds or folder.name.startswith(".part-"):
                    shutil.rmtree(folder, ignore_errors=True)
                    gone.append(folder.name)
        return gone

    def num_bytes(self) -> int:
        """Of all picture files."""
        return sum(path.stat().st_size for path in self.folder.glob("*/picture"))

    def _add(self, entry: Entry, data: bytes) -> Entry:
        if self.num_bytes() + len(data) > self.max_bytes:
            self.sweep()
            if self.num_bytes() + len(data) > self.max_bytes:
                raise UserError(f"this server keeps at most {self.max_bytes >> 20} MiB of pictures; try again later")
        part = self.folder / f".part-{entry.id}"
        try:
            part.mkdir(mode=0o700)
            if data:
                (part / "picture").write_bytes(data)
            (part / "entry.json").write_text(json.dumps(asdict(entry)))
            part.rename(self.folder / entry.id)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(f"the picture cannot be kept in {self.folder}: {error.strerror or error}") from error
        return entry

    def _place(self, ident: str) -> Path:
        if not _ID.fullmatch(ident):
            raise NotThere(f"{ident[:40]!r} is no picture's id")
        return self.folder / ident


def _new_id() -> str:
    return secrets.token_urlsafe(16)
