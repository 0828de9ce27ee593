"""Tar files whose bytes depend on nothing but names and contents: USTAR, time 0, one owner, one mode.

The writer returns where each member's content lies, so that a reader can fetch one sample without scanning.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE


class TarWriter:
    """Appends regular files to an open binary file. `close` writes the end marker; without it the tar is unfinished."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.position = 0

    def add(self, name: str, content: bytes) -> tuple[int, int]:
        """Write one member; returns (offset of the content, its length)."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.mode, info.mtime, info.uid, info.gid = 0o644, 0, 0, 0
        info.uname, info.gname = "", ""
        header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        padding = -len(content) % _BLOCK
        self.file.write(header)
        self.file.write(content)
        self.file.write(b"\0" * padding)
        offset = self.position + len(header)
        self.position = offset + len(content) + padding
        return offset, len(content)

    def close(self) -> None:
        end = 2 * _BLOCK
        end += -(self.position + end) % tarfile.RECORDSIZE
        self.file.write(b"\0" * end)
        self.position += end


def read_index(path: str | Path) -> list[tuple[str, int, int]]:
    """(name, offset, length) of every member of a finished tar. Damage raises `tarfile.TarError` or `ValueError`."""
    members = []
    with open(path, "rb") as file:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg() or member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"member {member.name!r} is not a plain file inside the archive")
                members.append((member.name, member.offset_data, member.size))
        end = members[-1][1] + members[-1][2] if members else 0
        file.seek(end + (-end % _BLOCK))
        tail = file.read()
        if len(tail) < 2 * _BLOCK or tail.strip(b"\0"):
            raise ValueError("the end marker is missing: the file was cut")
    return members
