"""One process, plain PyTorch: the engine for laptops and for machines without DeepSpeed.

Same interface as `training.engine.Engine`. Half precision is autocast; weights stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.config import StageConfig
from training.ema import Ema, Fragment, assemble, decay_at, to_tensors
from training.not_finite import skip_unless_finite
from training.optim import make_optimizer, set_lr
from training.power_ema import PowerAverages
from training.precision import DTYPES, autocast_to, cast
from training.snapshots import CpuCopies, Snapshot
from training.world import World


class LocalEngine:
    """Forward, backward, optimizer step, averaged weights and state of one network."""

    name = "torch"

    def __init__(self, module: nn.Module, config: StageConfig, world: World, accumulation: int) -> None:
        self.module, self.config, self.world, self.accumulation = module.to(world.device), config, world, accumulation
        self.optimizer = make_optimizer(self.module, config, world.device)
        self.dtype = DTYPES[config.precision]
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self._parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.ema = Ema(self.fragments())
        self.power = PowerAverages(self.fragments(), config)
        self._copies, self.stall = CpuCopies(), 0.0
        self._snapshot: Snapshot | None = None

    def __call__(self, *inputs: Any) -> Any:
        with autocast_to(self.dtype, self.world.device):
            return cast(self._forward(*inputs), torch.float32)  # losses are computed outside, exactly

    def _forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def fragments(self) -> list[Fragment]:
        """Master weights: here every parameter in full, in its own shape and order in memory."""
        return [
            Fragment(name, tuple(p.shape), 0, p.detach())
            for name, p in self.module.named_parameters()
            if p.requires_grad
        ]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; `loss` is the mean over its samples."""
        self._scaler.scale(loss / self.accumulation).backward()

    def step(self, step: int, lr: float) -> Tensor:
        """Apply the gradients of optimizer step `step` (1, 2, ...), average the weights → gradient norm. Where that is
        not finite, the weights stay."""
        if self._snapshot is not None:
            self.stall += self._snapshot.wait()
        set_lr(self.optimizer, lr)
        self._scaler.unscale_(self.optimizer)
        limit = self.config.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True)
        if not self._scaler.is_enabled():
            skip_unless_finite(self.optimizer, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.fragments(), decay_at(step, self.config.ema_decay, self.config.ema_warmup))
        self.power.update(self.fragments(), step)
        return norm

    def snapshot(self) -> Snapshot:
        """What a checkpoint holds, to be copied by its `files`; the next step waits for that."""
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        averages = to_tensors(self.ema.fragments(self.fragments()))
        files: dict[str, Any] = {"state.pt": state, "ema-00000.safetensors": averages}
        if power := self.power.tensors(self.fragments()):
            files["power-00000.safetensors"] = power
        self._snapshot = Snapshot(files, self._copies)
        return self._snapshot

    def load(self, folder: Path, saved_world_size: int) -> None:
        """Continue from the files of `snapshot` in a local folder."""
        state = torch.load(folder / "state.pt", map_location=self.world.device, weights_only=True)
        self.module.load_state_dict(state["module"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        fragments = self.fragments()
        shapes = {f.name: f.shape for f in fragments}
        self.ema.load(fragments, assemble([load_file(folder / "ema-00000.safetensors")], shapes))
        self.power.load(fragments, [load_file(path) for path in sorted(folder.glob("power-*.safetensors"))], shapes)

    def averaged(self) -> dict[str, Tensor] | None:
        """Whole averaged weights by parameter name, on the CPU."""
        return _whole(self.ema.fragments(self.fragments()))

    @torch.no_grad()
    def average_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors with the averaged weights of their names."""
        for fragment in self.ema.fragments(self.fragments()):
            tensors[fragment.name].copy_(fragment.tensor.view(fragment.shape))

    def power_averages(self) -> dict[float, dict[str, Tensor]] | None:
        """Length → whole power-function average by parameter name, on the CPU."""
        return {length: _whole(average) for length, average in self.power.fragments(self.fragments()).items()}


def _whole(fragments: list[Fragment]) -> dict[str, Tensor]:
    return {f.name: f.tensor.detach().cpu().reshape(f.shape) for f in fragments}
