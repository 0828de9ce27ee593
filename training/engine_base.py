"""What every engine does around its own optimizer: results in float32, averaged weights, snapshots for checkpoints.

An engine adds how one network is run, how its weights are changed, and in which pieces this worker holds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.config import StageConfig
from training.ema import Ema, Fragment, assemble, decay_at, to_tensors
from training.power_ema import PowerAverages
from training.precision import DTYPES, cast
from training.snapshots import CpuCopies, Snapshot
from training.world import World


class AveragingEngine(ABC):
    """See `training.engine.Engine`. A subclass sets `module`, and calls `_begin_averages` once the weights are where
    they stay."""

    name: str
    module: nn.Module
    ema: Ema
    power: PowerAverages

    def __init__(self, config: StageConfig, world: World) -> None:
        self.config, self.world = config, world
        self.dtype = DTYPES[config.precision]
        self.stall = 0.0
        self._copies = CpuCopies()
        self._snapshot: Snapshot | None = None

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """Master weights (float32) as this worker holds them, always in the same order."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch, whose mean loss this is."""

    @abstractmethod
    def average_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors with the averaged weights of their names. Collective."""

    @abstractmethod
    def _forward(self, *inputs: Any) -> Any:
        """The network's results in the stage's precision."""

    @abstractmethod
    def _update(self, lr: float) -> Tensor:
        """Apply the gradients → their global norm; where that is not finite, the weights stay."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """File name → what this worker stores of weights and optimizer. Collective."""

    @abstractmethod
    def _load_state(self, folder: Path, saved_world_size: int) -> None:
        """Take weights and optimizer from such files. Collective."""

    @abstractmethod
    def _on_main(self, fragments: list[Fragment]) -> dict[str, Tensor] | None:
        """Whole tensors by name on the CPU from the workers' fragments; None but on the main worker. Collective."""

    def __call__(self, *inputs: Any) -> Any:
        return cast(self._forward(*inputs), torch.float32)  # losses are computed outside, exactly

    def step(self, step: int, lr: float) -> Tensor:
        """Apply the gradients of optimizer step `step` (1, 2, ...), average the weights → gradient norm."""
        if self._snapshot is not None:
            self.stall += self._snapshot.wait()
        norm = self._update(lr)
        fragments = self.fragments()
        self.ema.update(fragments, decay_at(step, self.config.ema_decay, self.config.ema_warmup))
        self.power.update(fragments, step)
        return norm

    def snapshot(self) -> Snapshot:
        """What a checkpoint holds, to be copied by its `files`; the next step waits for that."""
        files, rank = self._state(), self.world.rank
        if self._holds_averages():
            files[f"ema-{rank:05d}.safetensors"] = to_tensors(self._averages())
            if power := self.power.tensors(self.fragments()):
                files[f"power-{rank:05d}.safetensors"] = power
        self._snapshot = Snapshot(files, self._copies)
        return self._snapshot

    def load(self, folder: Path, saved_world_size: int) -> None:
        """Continue from the files of `snapshot` in a local folder, whatever number of workers wrote them."""
        self._load_state(folder, saved_world_size)
        fragments, shapes = self.fragments(), self._shapes()
        parts, power = (
            [load_file(path) for path in sorted(folder.glob(f"{kind}-*.safetensors"))] for kind in ("ema", "power")
        )
        self.ema.load(fragments, assemble(parts, shapes))
        self.power.load(fragments, power, shapes)

    def averaged(self) -> dict[str, Tensor] | None:
        """Whole averaged weights by parameter name, on the CPU of the main worker."""
        return self._on_main(self._averages())

    def power_averages(self) -> dict[float, dict[str, Tensor]] | None:
        """Length → whole power-function average by parameter name, on the CPU of the main worker."""
        found = {length: self._on_main(parts) for length, parts in self.power.fragments(self.fragments()).items()}
        return {length: full for length, full in found.items() if full is not None} if self.world.is_main else None

    def _begin_averages(self) -> None:
        self.ema = Ema(self.fragments())
        self.power = PowerAverages(self.fragments(), self.config)

    def _averages(self) -> list[Fragment]:
        return self.ema.fragments(self.fragments())

    def _holds_averages(self) -> bool:
        """Whether this worker stores averages: the main one for all, where each holds the same."""
        return self.world.is_main

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters, whole."""
        return {name: tuple(parameter.shape) for name, parameter in self._trained()}
