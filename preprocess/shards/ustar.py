"""Tar files whose bytes depend on nothing but names and contents: USTAR, time 0, one owner, one mode.

The writer is the webdataset library's. Ours adds where each member's content lies, so that a reader can fetch one
sample without scanning.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import BinaryIO

_BLOCK = tarfile.BLOCKSIZE


class SampleWriter:
    """Appends samples to an open binary file. `close` writes the end marker; without it the tar is unfinished."""

    def __init__(self, file: BinaryIO) -> None:
        import webdataset as wds

        self._writer = wds.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)

    def add(self, key: str, members: dict[str, bytes]) -> list[int]:
        """Write one sample, its members by extension; returns (offset, length) of each content, in the order of the
        sorted extensions, as one flat list."""
        position = self._writer.tarstream.offset
        self._writer.write({"__key__": key, **members})
        places: list[int] = []
        for _, content in sorted(members.items()):
            places += [position + _BLOCK, len(content)]
            position += _BLOCK + len(content) + -len(content) % _BLOCK
        if position != self._writer.tarstream.offset:
            raise AssertionError(f"sample {key}: a header is not one block long")
        return places

    def close(self) -> None:
        self._writer.close()

    def __del__(self) -> None:
        # What is left unfinished stays so: the tar would write its end marker now, into a file that may be closed.
        if (writer := getattr(self, "_writer", None)) is not None:
            writer.tarstream.closed = writer.tarstream.fileobj.closed = True


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
