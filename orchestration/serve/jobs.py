"""Renderings under way and their files, in a folder beside the pictures, so that every server with that folder can be
asked about one, and be told to stop it. Each lies in a folder of its own, under the digest of its name; what a killed
server leaves is removed by the next one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from pydantic import BaseModel

from orchestration.serve.desk import Busy, Unwanted
from orchestration.serve.shelf import Full, NotThere
from pipeline.errors import UserError

TELL = 0.5
"""Seconds between two looks at the folder, while pixels are drawn."""
KEPT = 600.0
"""Seconds for which a file waits to be fetched."""
ALONE = 180.0
"""Seconds after which a rendering ends whose progress nobody asks for; browsers ask once a minute for hidden pages."""
SILENT = 300.0
"""Seconds after which a process of another machine is taken to be gone: it tells of its renderings once a minute."""
MAX_KEPT = 32
"""Renderings under way, or waiting to be fetched."""


class Progress(BaseModel):
    """Of a rendering. done, pixels: drawn, and of the whole. problem: why there is none."""

    done: int
    pixels: int
    is_finished: bool = False
    problem: str = ""
    file: str = ""


@dataclass(frozen=True)
class _Owner:
    """A process: of which machine, which, started when."""

    host: str
    pid: int
    started: float

    @classmethod
    def me(cls) -> _Owner:
        own = psutil.Process()
        return cls(socket.gethostname(), own.pid, own.create_time())

    @property
    def is_here(self) -> bool:
        """Of this machine: whether it runs still can be told."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.Error:
            return True


class Job:
    """A rendering under way in this process. is_alone: nobody waits for its answer, it is asked about instead."""

    def __init__(self, folder: Path, progress: Progress, is_alone: bool) -> None:
        self.folder, self._progress, self.is_alone = folder, progress, is_alone
        self.is_stopped = False
        self._owner, self._told = _Owner.me(), 0.0

    @property
    def done(self) -> int:
        """Pixels that are drawn."""
        return self._progress.done

    @property
    def file(self) -> Path:
        """Where it is drawn to, with the suffix of its name."""
        return self.folder / f"rendering{Path(self._progress.file).suffix}"

    def on_pixels(self, num: int) -> None:
        """Raises `Unwanted` where it is to end."""
        self._progress.done += num
        if not self.is_stopped and time.monotonic() - self._told > TELL:
            self.tell()
        if self.is_stopped:
            raise Unwanted("the rendering was stopped")

    def tell(self) -> None:
        """Write how far it is, and look whether it is wanted still."""
        self._told = time.monotonic()
        asked = _modified(self.folder / "asked")
        if (self.folder / "stop").exists() or (self.is_alone and time.time() - asked > ALONE):
            self.is_stopped = True
        state = json.dumps({"owner": asdict(self._owner), **self._progress.model_dump()})
        with contextlib.suppress(OSError):  # its folder is gone, or full: what is drawn hears of it itself
            (self.folder / ".state").write_text(state)
            (self.folder / ".state").replace(self.folder / "state.json")

    def finish(self, problem: str = "") -> None:
        """Its file waits to be fetched, or there is none."""
        self._progress.is_finished, self._progress.problem = True, problem
        self.tell()


class Jobs:
    """The renderings of one folder. max_bytes: of files that wait. Iterates over the names of those under way here."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._here: dict[str, Job] = {}
        self._lock = threading.Lock()
        self.sweep()

    def __len__(self) -> int:
        return len(self._here)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._here))

    def begin(self, name: str, num_pixels: int, file: str, *, is_alone: bool = False) -> Job:
        """file: the name it is saved by. Raises `UserError` for a name that is taken, `Busy` and `Full`."""
        kept = self._folders()
        if len(kept) >= MAX_KEPT:
            raise Busy(f"{len(kept)} renderings are under way or wait to be fetched; try again in a moment")
        if sum(map(_bytes_of, kept)) > self.max_bytes:
            raise Full(f"renderings that wait to be fetched take {self.max_bytes >> 20} MiB; try again later")
        job = Job(self._place(name), Progress(done=0, pixels=num_pixels, file=file), is_alone)
        try:
            self.folder.mkdir(exist_ok=True, mode=0o700)
            job.folder.mkdir(mode=0o700)
            (job.folder / "asked").touch()
        except FileExistsError:
            raise UserError(f"a rendering {name!r} is under way already; give another name") from None
        except OSError as error:
            raise Full(f"a rendering cannot be kept here: {error.strerror or error}") from error
        job.tell()
        self._here[name] = job
        return job

    def end(self, name: str) -> None:
        """It is not under way here any more; its folder stays."""
        self._here.pop(name, None)

    def remove(self, name: str) -> None:
        self.end(name)
        for _ in range(3):  # who asks it to stop meanwhile writes into the folder
            shutil.rmtree(self._place(name), ignore_errors=True)
            if not self._place(name).exists():
                return

    def progress(self, name: str) -> Progress:
        """Of a rendering of any server with this folder. Raises `NotThere`."""
        folder = self._place(name)
        with contextlib.suppress(OSError):
            os.utime(folder / "asked")  # not made anew in a folder that is just being removed
        if (job := self._here.get(name)) is not None:
            return job._progress
        try:
            return Progress.model_validate(json.loads((folder / "state.json").read_bytes()))
        except (OSError, ValueError) as error:
            raise NotThere(f"there is no rendering {name[:64]!r}") from error

    def file(self, name: str) -> tuple[Path, str]:
        """Where a finished rendering lies, and the name it is saved by. Raises `UserError`."""
        progress = self.progress(name)
        if not progress.is_finished or progress.problem:
            raise UserError(progress.problem or f"the rendering {name[:64]!r} is under way still")
        return self._place(name) / f"rendering{Path(progress.file).suffix}", progress.file

    def stop(self, name: str) -> None:
        """Have a rendering end, whichever server draws it, or its file be removed."""
        with contextlib.suppress(OSError, NotThere):
            (self._place(name) / "stop").touch()
            if name not in self._here and self.progress(name).is_finished:
                self.remove(name)
        if (job := self._here.get(name)) is not None:
            job.is_stopped = True

    def stop_all(self) -> None:
        """Those of this process."""
        for job in list(self._here.values()):
            job.is_stopped = True

    def sweep(self) -> None:
        """Remove files that nobody fetched, and what processes left that are gone. Once a minute: it also tells others
        of those that are under way here."""
        for job in list(self._here.values()):
            job.tell()
        for folder in self._folders():
            with contextlib.suppress(OSError):
                try:
                    state = json.loads((folder / "state.json").read_bytes())
                    is_finished, owner = state["is_finished"], _Owner(**state["owner"])
                    silent = time.time() - (folder / "state.json").stat().st_mtime
                    is_gone = owner.is_gone if owner.is_here else silent > SILENT
                except (OSError, ValueError, KeyError, TypeError):
                    is_finished, is_gone = True, False
                if (is_gone and not is_finished) or (is_finished and time.time() - folder.stat().st_mtime > KEPT):
                    shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _place(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()[:32]


def _bytes_of(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(part.stat().st_size for part in folder.iterdir() if "rendering" in part.name)
    return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed with its folder: the rendering is not wanted
        return 0.0
