"""Builds shard files and publishes them: temporary local file, checked, then shown whole, its receipt after it.

Runs in a thread of its own beside the encoder; a bounded queue holds the encoder back when the store is slow.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage import filesystem, is_local, join, publish_file, sha256_file, write_bytes
from preprocess.config import PreprocessConfig
from preprocess.latent_stats import LatentSums
from preprocess.plan import ShardPlan
from preprocess.receipt import Receipt, parse_receipt, seal, without_index
from preprocess.retry import FULL, RetryCounter, explain_full_disk, with_retries
from preprocess.sample import SCHEMA_VERSION, Sample, encode_members, key, latent_member
from preprocess.ustar import SampleWriter, read_index

SCRATCH_PREFIX = ".preprocess-"


class ShardFile:
    """One shard being written to a temporary local file."""

    def __init__(self, shard: ShardPlan, config: PreprocessConfig, suffixes: list[str], latent_shape: list[int] | None,
                 latent_channels: int) -> None:  # fmt: skip
        self.shard, self.config, self.suffixes = shard, config, suffixes
        handle, name = tempfile.mkstemp(prefix=SCRATCH_PREFIX, suffix=".tar", dir=scratch_dir(config.dest))
        self.path = Path(name)
        self.file = os.fdopen(handle, "wb")
        self.writer = SampleWriter(self.file)
        self.ids: list[str] = []
        self.offsets: list[list[int]] = []
        self.sources: list[str] = []
        has_variance = latent_shape is not None and latent_shape[0] == 2 * latent_channels
        self.sums = LatentSums(latent_channels, has_variance)

    def add(self, sample: Sample) -> None:
        members = encode_members(sample, self.config.pixel_format)
        positions = self.writer.add(key(sample.index), members)
        if len(positions) != 2 * len(self.suffixes):
            raise AssertionError(f"sample {sample.info['id']} has members outside the plan")
        self.ids.append(sample.info["id"])
        self.offsets.append(positions)
        self.sources.append(sample.info["sha256"])
        stored = sample.latents.get(latent_member(flip=False))
        if stored is not None:
            self.sums.add(stored)

    def finish(self, plan_hash: str, rejects: list[dict[str, object]]) -> Receipt:
        """Close and check the file; returns its receipt, not yet published."""
        self.writer.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self._check()
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.shard.name,
            "split": self.shard.split,
            "plan": plan_hash,
            "bytes": self.path.stat().st_size,
            "sha256": sha256_file(str(self.path)),
            "num_samples": len(self.ids),
            "first_index": self.shard.first_index,
            "suffixes": self.suffixes,
            "ids": self.ids,
            "offsets": self.offsets,
            "sources": self.sources,
            "rejects": rejects,
            "latents": self.sums.to_dict() if self.sums.count else None,
        }

    def _check(self) -> None:
        """Read the finished file back and compare its index with what was written."""
        found = [(offset, length) for _, offset, length in read_index(self.path)]
        flat = [tuple(p[i : i + 2]) for p in self.offsets for i in range(0, len(p), 2)]
        if found != flat:
            raise UserError(f"{self.path} reads back differently from what was written; is the disk healthy?")

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk, closing fails too
            self.file.close()
        self.path.unlink(missing_ok=True)


def publish_shard(shard_file: ShardFile, receipt: Receipt, dest: str, attempts: int, counter: RetryCounter) -> Receipt:
    """Show the shard, then its receipt. Returns the receipt without its index."""
    name = receipt["name"]
    url = join(dest, name + ".tar")

    def upload() -> None:
        attempt = shard_file.path.with_suffix(".attempt")
        with contextlib.suppress(FileNotFoundError):
            attempt.unlink()
        os.link(shard_file.path, attempt)
        publish_file(attempt, url)

    sealed = seal(receipt)
    try:
        with_retries(upload, url, attempts, counter)
        with_retries(lambda: write_bytes(join(dest, name + ".json"), sealed), f"{dest}/{name}.json", attempts, counter)
    finally:
        shard_file.discard()
    return without_index(parse_receipt(sealed, name))


class Publisher:
    """The writing thread. `put` hands it samples in plan order; `close_shard` ends a shard; `receipts` collects."""

    def __init__(self, config: PreprocessConfig, plan_hash: str, suffixes: list[str], latent_shape: list[int] | None,
                 latent_channels: int, counter: RetryCounter) -> None:  # fmt: skip
        self.config, self.plan_hash, self.counter = config, plan_hash, counter
        self._layout = (suffixes, latent_shape, latent_channels)
        self._tasks: queue.Queue[tuple[ShardPlan, list[Sample], list[dict[str, object]] | None] | None] = queue.Queue(4)
        self._done: queue.SimpleQueue[Receipt] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._current: ShardFile | None = None
        self.wait_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)
        self._thread.start()

    def put(self, shard: ShardPlan, samples: list[Sample]) -> None:
        self._enqueue((shard, samples, None))

    def close_shard(self, shard: ShardPlan, rejects: list[dict[str, object]]) -> None:
        self._enqueue((shard, [], rejects))

    def receipts(self) -> Iterator[Receipt]:
        """Receipts of the shards published since the last call."""
        while not self._done.empty():
            yield self._done.get()

    def close(self) -> None:
        """Wait for all that was handed over; raises what went wrong."""
        self._enqueue(None)
        self._thread.join()
        self._raise()

    def abort(self) -> None:
        """Stop at once; nothing unfinished is shown."""
        self._error = self._error or InterruptedError("stopped")
        with contextlib.suppress(queue.Full):
            self._tasks.put_nowait(None)
        self._thread.join()

    def _enqueue(self, task: tuple[ShardPlan, list[Sample], list[dict[str, object]] | None] | None) -> None:
        start = time.perf_counter()
        while True:
            self._raise()
            with contextlib.suppress(queue.Full):
                self._tasks.put(task, timeout=0.2)
                break
        self.wait_seconds += time.perf_counter() - start

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while self._error is None and (task := self._tasks.get()) is not None:
                self._handle(*task)
        except BaseException as error:  # handed to the encoder's thread, which raises it
            self._error = explain_full_disk(error, self.config.dest)
        finally:
            if self._current is not None:
                self._current.discard()

    def _handle(self, shard: ShardPlan, samples: list[Sample], rejects: list[dict[str, object]] | None) -> None:
        if self._current is None:
            self._current = ShardFile(shard, self.config, *self._layout)
        for sample in samples:
            self._current.add(sample)
        if rejects is not None:
            receipt = self._current.finish(self.plan_hash, rejects)
            self._done.put(publish_shard(self._current, receipt, self.config.dest, self.config.retries, self.counter))
            self._current = None


def scratch_dir(dest: str) -> str | None:
    """Where shards grow: in a local destination itself (so that publishing is a rename), else the system's place."""
    if not is_local(dest):
        return None
    path = Path(filesystem(dest)[1])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another destination") from error
    return str(path)


@contextlib.contextmanager
def sole_run(dest: str) -> Iterator[None]:
    """Keep a second run out of a local destination. The lock is the folder's own, which filelock has none of: no file,
    and a kill releases it."""
    folder = scratch_dir(dest)
    if folder is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {dest}; wait for it, or choose another folder") from error
        except OSError as error:  # some network file systems have no locks
            print(f"preprocess: cannot lock {dest} ({error.strerror}); start no second run there", file=sys.stderr)
        yield
    finally:
        os.close(handle)


def remove_scratch(dest: str) -> None:
    """Delete temporary files that a killed run left in a local destination."""
    if is_local(dest):
        folder = Path(filesystem(dest)[1])
        for pattern in (f"{SCRATCH_PREFIX}*", "latentzoom-*", ".shard-*.tmp", ".*.json.*.tmp"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
