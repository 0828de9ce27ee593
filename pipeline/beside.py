"""Files written beside their target and renamed when they are whole, so that nobody ever sees a part of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_MAX_NAME = 255
"""Bytes of a file's name that every usual file system allows."""


def hidden(target: Path, ending: str) -> Path:
    """Beside `target`, the hidden name of what belongs to it while it is not finished: .NAME.ENDING, or a digest in the
    place of a name that would get too long."""
    name = f".{target.name}.{ending}"
    if len(os.fsencode(name)) > _MAX_NAME:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.{ending}"
    return target.with_name(name)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A stream to write what becomes `target` when the block ends well; otherwise it is gone, and what was at `target`
    stays. The folder is made. What a killed run left of the same target is taken over. Raises `OSError`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, stream = _held(target)
    with stream:
        try:
            yield stream
            stream.flush()
            if os.name == "nt":  # where nothing that is open can be renamed
                stream.close()
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _held(target: Path) -> tuple[Path, BinaryIO]:
    """.NAME.part, empty and locked while it is open; where another process is writing it, a name of our own.

    The lock is that of the very file that becomes the target. filelock locks a file for nothing else, which it leaves
    beside every target.
    """
    while fcntl is not None:
        temporary = hidden(target, "part")
        stream: BinaryIO = open(temporary, "r+b", opener=_created)  # noqa: SIM115
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(stream.fileno()), temporary.stat()):
                stream.truncate()
                return temporary, stream
        except FileNotFoundError:
            pass  # whoever had it was done in between
        except OSError:
            stream.close()
            break
        stream.close()
    temporary = hidden(target, f"{os.getpid()}.part")
    return temporary, temporary.open("w+b")


def _created(path: str, flags: int) -> int:
    """Opened, made where it is not there, and never emptied before it is locked."""
    return os.open(path, flags | os.O_CREAT, 0o666)
