"""Snapshots of the power-function averages: `averages/step-00002000.safetensors` in the run folder, each with
both averages in float32 under names "σ/name". Written in the background on the main worker.
"""

from __future__ import annotations

import logging
import re
import tempfile
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import storage
from training.background import BackgroundWriting
from training.context import Context
from training.engine import Engine

FOLDER = "averages"
_SCRATCH = "latentzoom-averages-"
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_log = logging.getLogger("latentzoom")


class PowerSnapshots:
    """Stores the engine's power-function averages every so often, where the settings ask for it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.every = context.config.power_ema_every
        self._writing = BackgroundWriting()

    def due(self, step: int) -> bool:
        return bool(self.every) and (step % self.every == 0 or step == self.context.config.steps)

    def go_on(self, engine: Engine, step: int) -> None:
        """A run goes on after `step`: snapshots of later steps, which it will make anew, are dropped. One that began
        without the averages has none of its beginning, and keeps none."""
        if self.every and not engine.power.is_whole:
            self.every = 0
            if self.context.world.is_main:
                _log.info(
                    "%s: no snapshots of power-function averages, since this run began without them (power_ema_every)",
                    self.context.stage,
                )
        if self.context.world.is_main:
            _remove_unfinished(self.context.run_dir)
            for later in [found for found in snapshot_steps(self.context.run_dir) if found > step]:
                storage.remove_tree(snapshot_url(self.context.run_dir, later))

    def write(self, engine: Engine, step: int) -> None:
        """Start writing the averages after `step`. Collective."""
        found = engine.power_averages()
        if found is None:
            return
        tensors = {f"{sigma:.3f}/{name}": t.clone() for sigma, whole in found.items() for name, t in whole.items()}
        url = snapshot_url(self.context.run_dir, step)
        self._writing.start(f"averages-{step}", (url, partial(_publish, tensors, url)))

    def close(self) -> None:
        """Wait for what is being written."""
        self._writing.close()


def _remove_unfinished(run_dir: str) -> None:
    """Delete what a writer that was killed left behind: it is as large as a snapshot."""
    if storage.is_local(run_dir):
        folder = Path(storage.absolute(run_dir), FOLDER)
        for left in [*folder.glob(f"{_SCRATCH}*"), *folder.glob(".step-*.tmp")]:
            storage.remove_tree(str(left))


def _publish(tensors: dict[str, Tensor], url: str) -> None:
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=_beside(url)) as scratch:
        path = Path(scratch, "averages.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        storage.publish_file(path, url)


def _beside(url: str) -> str | None:
    """A folder for the temporary file: the target's own, so that publishing is a rename."""
    if not storage.is_local(url):
        return None
    folder = Path(storage.absolute(url)).parent
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def snapshot_url(run_dir: str, step: int) -> str:
    return storage.join(run_dir, FOLDER, f"step-{step:08d}.safetensors")


def snapshot_steps(run_dir: str) -> list[int]:
    """Steps of which there are snapshots, ascending."""
    names = storage.list_folder(storage.join(run_dir, FOLDER))
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def read_snapshot(run_dir: str, step: int) -> dict[float, dict[str, Tensor]]:
    """Length → average by name of the stage's network."""
    url = snapshot_url(run_dir, step)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as scratch:
        path = Path(storage.absolute(url)) if storage.is_local(url) else Path(scratch, "averages.safetensors")
        if not storage.is_local(url):
            storage.fetch_file(url, path)
        tensors = load_file(path)
    averages: dict[float, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        length, _, name = key.partition("/")
        averages.setdefault(float(length), {})[name] = tensor
    return averages
