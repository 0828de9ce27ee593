"""Checkpoints of a run: `checkpoints/step-00000500/` with the engine's files, one receipt a worker and, written last
by the main worker, `manifest.json` with the SHA-256 of every file. A folder without manifest is not a checkpoint.

Writing happens in a background thread from CPU copies, so training goes on meanwhile. Loading takes the newest folder
whose files all have the hashes that the manifest names; only such files are ever unpickled. One that is not as its
manifest says is kept under another name: a file system may have read it wrongly.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline import storage
from pipeline.errors import Unreachable, UserError
from training.world import World

FORMAT = "latentzoom-checkpoint/1"
_log = logging.getLogger("latentzoom")


@dataclass(frozen=True)
class Saved:
    """A verified checkpoint in a local folder. `state` is what the session stored: loader position, losses, time."""

    step: int
    folder: Path
    world_size: int
    engine: str
    state: dict[str, Any]


class CheckpointStore:
    """Writes, prunes and finds the checkpoints under `url`. Every worker has one; methods marked collective agree."""

    def __init__(self, url: str, world: World, keep: int) -> None:
        self.url, self.world, self.keep = url, world, keep
        self.attempt: str = world.broadcast(uuid.uuid4().hex)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._fetched: Path | None = None

    def save(self, step: int, engine: str, files: Callable[[], dict[str, Any]], state: dict[str, Any]) -> None:
        """Start writing what `files` gives (it is called in the background); returns at once unless the previous
        checkpoint is still being written."""
        self.wait()
        self._thread = threading.Thread(
            target=self._write_guarded, args=(step, engine, files, state), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint being written is complete; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(f"checkpoint under {self.url} could not be written: {error}") from error

    def close(self) -> None:
        """Finish writing and delete what was fetched."""
        self.wait()
        if self._fetched is not None:
            shutil.rmtree(self._fetched, ignore_errors=True)

    def latest(self) -> Saved | None:
        """The newest sound checkpoint, or None. Collective; unsound ones are named in a warning and set aside, those
        that were never complete deleted."""
        manifest = self.world.broadcast(self._find() if self.world.is_main else None)
        if manifest is None:
            return None
        step = int(manifest["step"])
        problem = ""
        if self.world.local_rank == 0 and not self.world.is_main:  # another machine: it reads, or fetches, for itself
            problem = self._problem(manifest)
        if problems := [found for found in self.world.gather(problem) if found]:
            raise UserError(
                f"checkpoint {storage.join(self.url, step_name(step))} is not the same on every machine: "
                f"{problems[0]}; use a run folder that all machines share, or run again"
            )
        folder = self._local(step) if storage.is_local(self.url) else self._cache(step)
        return Saved(step, folder, int(manifest["world_size"]), manifest["engine"], manifest["state"])

    def newest_step(self) -> int | None:
        """Step of the newest complete checkpoint, whether sound or not; None where there is none."""
        return max((step for step, is_complete in self._steps().items() if is_complete), default=None)

    def _find(self) -> dict[str, Any] | None:
        if storage.is_local(self.url):
            for stale in Path(self.url).glob(".writing-*"):
                shutil.rmtree(stale, ignore_errors=True)
        for step, complete in sorted(self._steps().items(), reverse=True):
            name = step_name(step)
            problem = "it has no manifest.json (writing it was interrupted)"
            # A network file system may list a folder as it was before: what is deleted was asked for by name.
            complete = complete or storage.exists(storage.join(self.url, name, "manifest.json"))
            if complete:
                manifest, problem = self._verified(step)
                if manifest is not None:
                    return manifest
            url, done = storage.join(self.url, name), "deleted"
            if complete:
                aside = f"unverified-{name}-{self.attempt[:8]}"
                storage.move_tree(url, storage.join(self.url, aside))
                done = f"kept as {aside}; check it, then rename it back or delete it"
            else:
                storage.remove_tree(url)
            _log.warning("checkpoint %s is skipped: %s; it is %s", url, problem, done)
        if kept := [name for name in storage.list_folder(self.url) if name.startswith("unverified-")]:
            raise UserError(
                f"no checkpoint under {self.url} can be verified ({kept[-1]} was the last), and the run is not begun "
                "anew over them; check the file system and rename one back to step-..., or choose another run folder"
            )
        return None

    def _steps(self) -> dict[int, bool]:
        """Step → whether its folder has a manifest."""
        return _steps_in(self.url)

    def _verified(self, step: int) -> tuple[dict[str, Any] | None, str]:
        """The manifest when every file is as it says, else what is wrong."""
        try:
            manifest = storage.read_json(storage.join(self.url, step_name(step), "manifest.json"))
        except Unreachable:  # that says nothing of it
            raise
        except UserError as error:
            return None, str(error)
        except OSError as error:
            return None, f"manifest.json cannot be read ({error.strerror})"
        if manifest.get("format") != FORMAT:
            return None, f"manifest.json has format {manifest.get('format')!r}, expected {FORMAT!r}"
        problem = self._problem(manifest)
        return (None, problem) if problem else (manifest, "")

    def _problem(self, manifest: dict[str, Any]) -> str:
        """What is wrong with the files here, or nothing."""
        folder = self._local(int(manifest["step"]))
        for name, entry in sorted(manifest["files"].items()):
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            try:
                is_sound = path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"]
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            if not is_sound:
                return f"{name} is damaged (its SHA-256 differs from manifest.json)"
        # DeepSpeed's converter unpickles every file whose name fits, so there must be no other.
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix in (".pt", ".safetensors") and name not in manifest["files"]:
                return f"{name} is not in manifest.json"
        return ""

    def _local(self, step: int) -> Path:
        """A local folder with the checkpoint: the original, or a copy of a remote one."""
        url = storage.join(self.url, step_name(step))
        if not storage.is_local(self.url):
            self._fetched = self._cache(step).parent
        return storage.fetch_dir(url, self._cache(step))

    def _cache(self, step: int) -> Path:
        key = hashlib.sha256(f"{self.url} {self.attempt}".encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir(), f"latentzoom-checkpoint-{key}", step_name(step))

    def _write_guarded(
        self, step: int, engine: str, files: Callable[[], dict[str, Any]], state: dict[str, Any]
    ) -> None:
        try:
            self._write(step, engine, files(), state)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, engine: str, files: dict[str, Any], state: dict[str, Any]) -> None:
        target = storage.join(self.url, step_name(step))
        with _scratch(self.url, f"{self.attempt}-{self.world.rank}") as scratch:
            entries = {}
            for name, content in files.items():
                path = scratch / name.replace("/", "_")
                if name.endswith(".safetensors"):
                    save_file({key: tensor.contiguous() for key, tensor in content.items()}, path)
                else:
                    torch.save(content, path)
                entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                storage.publish_file(path, storage.join(target, name))
        receipt = {"attempt": self.attempt, "files": entries}
        storage.write_json(storage.join(target, _receipt_name(self.world.rank)), receipt)
        if self.world.is_main:
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": self.world.size,
                "engine": engine,
                "state": state,
                "files": self._collect(target),
            }
            storage.write_json(storage.join(target, "manifest.json"), manifest)
            self._prune()

    def _collect(self, target: str, timeout: float = 1800.0) -> dict[str, Any]:
        """Wait for every worker's receipt of this attempt and merge their file lists."""
        files: dict[str, Any] = {}
        deadline = time.monotonic() + timeout
        pause = 0.02 if storage.is_local(target) else 1.0
        for rank in range(self.world.size):
            url = storage.join(target, _receipt_name(rank))
            while not storage.exists(url) or (receipt := storage.read_json(url))["attempt"] != self.attempt:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"worker {rank} did not finish its part of {target}")
                time.sleep(pause)
            files.update(receipt["files"])
        return files

    def _prune(self) -> None:
        """Keep the newest `keep` complete checkpoints. The manifest goes first, so none is ever half deleted."""
        complete = sorted(step for step, is_complete in self._steps().items() if is_complete)
        for step in complete[: -self.keep]:
            folder = storage.join(self.url, step_name(step))
            fs, path = storage.filesystem(storage.join(folder, "manifest.json"))
            fs.rm_file(path)
            storage.remove_tree(folder)


def step_name(step: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}"


def newest_state(url: str) -> dict[str, Any] | None:
    """What the newest complete checkpoint under `url` stored beside the engine's files, though those be damaged; older
    ones are asked where its own manifest cannot be read."""
    for step in sorted((step for step, is_complete in _steps_in(url).items() if is_complete), reverse=True):
        try:
            return dict(storage.read_json(storage.join(url, step_name(step), "manifest.json"))["state"])
        except Unreachable:
            raise
        except (UserError, OSError, KeyError, TypeError):  # whoever continues from it says what is wrong
            continue
    return None


def _steps_in(url: str) -> dict[int, bool]:
    steps: dict[int, bool] = {}
    for name in storage.list_files(url):
        folder, _, rest = name.partition("/")
        if folder.startswith("step-") and folder[5:].isdigit():
            steps[int(folder[5:])] = steps.get(int(folder[5:]), False) or rest == "manifest.json"
    return steps


def _receipt_name(rank: int) -> str:
    return f"worker-{rank:05d}.json"


@contextlib.contextmanager
def _scratch(url: str, name: str) -> Any:
    """A folder for files being written: beside a local target, so that publishing is a rename."""
    if storage.is_local(url):
        folder = Path(storage.absolute(url), f".writing-{name}")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="latentzoom-checkpoint-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_space_error(url: str, needed: int) -> str | None:
    """A sentence when a local folder has less than `needed` bytes free, else None."""
    if not storage.is_local(url):
        return None
    folder = Path(storage.absolute(url))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{os.fspath(folder)} has {free >> 20} MiB free, but the checkpoints need about {needed >> 20} MiB"
