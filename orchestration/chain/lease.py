"""One job at a time in a working folder: a file lock where the folder is local, a lease object on object stores.

Lease objects are numbered and created with a conditional write, so of two jobs that start at once one gets it. The
holder renews its lease; a holder that died is succeeded, by the next number, once its lease has run out. A holder that
was cut off and finds a higher number stops before it writes anything more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.errors import UserError, first_line

LEASE_S = 90.0
RENEW_S = 20.0
_PREFIX = "lease-"


@contextlib.contextmanager
def sole_job(work: str, kind: str = "job", option: str = "--workdir") -> Iterator[Callable[[], None]]:
    """Hold `work` for the time of the block; yields a check that raises `UserError` when it was lost.

    kind, option: what messages call the job, and the option that chooses another folder. Raises `UserError` when
    another job holds it. A killed job's hold ends with it (local) or within 90 s (remote).
    """
    if storage.is_local(work):
        with _file_lock(work, kind, option):
            yield lambda: None
    else:
        lease = _Lease(work)
        lease.acquire()
        try:
            yield lease.check
        finally:
            lease.release()


@contextlib.contextmanager
def _file_lock(work: str, kind: str, option: str) -> Iterator[None]:
    folder = Path(storage.filesystem(work)[1])
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another {kind} is running in {work}; wait for it, or use another {option}") from error
    except OSError as error:
        raise UserError(f"cannot write to {work}: {error.strerror}; choose another {option}") from error
    try:
        yield
    finally:
        lock.release()


class _Lease:
    def __init__(self, work: str) -> None:
        self.folder = storage.join(work, "lease")
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.number = 0
        self._stop = threading.Event()
        self._lost = False
        self._renewing = threading.Lock()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> None:
        numbers = self._numbers()
        newest = numbers[-1] if numbers else 0
        if newest:
            held = storage.read_json(self._url(newest))
            if held["until"] > time.time():
                raise UserError(
                    f"another job ({held['owner']}) is running in {self.folder.removesuffix('/lease')}; wait for it. "
                    f"If it was killed, its hold ends in {held['until'] - time.time():.0f} s"
                )
        fs, path = storage.filesystem(self._url(newest + 1))
        try:
            fs.pipe_file(path, self._content(), mode="create")
        except OSError as error:  # stores name "it exists already" differently
            if newest + 1 not in self._numbers():
                raise UserError(
                    f"cannot write to {self.folder.removesuffix('/lease')}: {first_line(error)}; check the address and "
                    "the credentials, or choose another place"
                ) from error
            if storage.read_json(self._url(newest + 1))["owner"] != self.owner:  # else: only the answer was lost
                raise UserError(
                    f"another job took {self.folder.removesuffix('/lease')} just now; wait for it"
                ) from error
        self.number = newest + 1
        for number in numbers[:-1]:  # the newest stays until it is succeeded for certain
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(storage.filesystem(self._url(number))[1])
        self._thread.start()

    def check(self) -> None:
        """Raise when another job has taken over. A hold that could not be renewed in time is looked at now, before
        anything is written: while the store does not answer nobody else can take it either."""
        if not self._lost and time.monotonic() - self._renewed > LEASE_S:
            self._renew_once()
        if self._lost:
            raise UserError(f"lost the hold on {self.folder.removesuffix('/lease')}; run the same command again")

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(Exception):  # of a store that is gone: the hold runs out by itself
                self._write(until=0.0)

    def _renew(self) -> None:
        while not self._lost and not self._stop.wait(RENEW_S):
            self._renew_once()

    def _renew_once(self) -> None:
        """A store that does not answer, in whatever words its client has, is asked again in a while."""
        with self._renewing, contextlib.suppress(Exception):
            if self._numbers()[-1:] != [self.number]:
                self._lost = True
            else:
                self._write(until=time.time() + LEASE_S)
                self._renewed = time.monotonic()

    def _write(self, until: float) -> None:
        fs, path = storage.filesystem(self._url(self.number))
        fs.pipe_file(path, self._content(until))

    def _content(self, until: float | None = None) -> bytes:
        content: dict[str, Any] = {"owner": self.owner, "until": time.time() + LEASE_S if until is None else until}
        return json.dumps(content).encode()

    def _numbers(self) -> list[int]:
        fs, path = storage.filesystem(self.folder)
        fs.invalidate_cache()
        if not fs.exists(path):
            return []
        names = [str(name).rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)]
        return sorted(int(name.removeprefix(_PREFIX)[:8]) for name in names if name.startswith(_PREFIX))

    def _url(self, number: int) -> str:
        return storage.join(self.folder, f"{_PREFIX}{number:08d}.json")
