"""One process, plain PyTorch: the engine for laptops and for machines without DeepSpeed.

Half precision is autocast; weights stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.config import StageConfig
from training.ema import Fragment
from training.engine_base import AveragingEngine
from training.not_finite import skip_unless_finite
from training.optim import make_optimizer, set_lr
from training.precision import autocast_to
from training.world import World


class LocalEngine(AveragingEngine):
    """Forward, backward, optimizer step, averaged weights and state of one network."""

    name = "torch"

    def __init__(self, module: nn.Module, config: StageConfig, world: World, accumulation: int) -> None:
        super().__init__(config, world)
        self.module, self.accumulation = module.to(world.device), accumulation
        self.optimizer = make_optimizer(self.module, config, world.device)
        self._network = self.module
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self._parameters = [parameter for _, parameter in self._trained()]
        self._begin_averages()

    def fragments(self) -> list[Fragment]:
        """Master weights: here every parameter in full, in its own shape and order in memory."""
        return [Fragment(name, tuple(p.shape), 0, p.detach()) for name, p in self._trained()]

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss / self.accumulation).backward()

    @torch.no_grad()
    def average_into(self, tensors: Mapping[str, Tensor]) -> None:
        for fragment in self._averages():
            tensors[fragment.name].copy_(fragment.tensor.view(fragment.shape))

    def _forward(self, *inputs: Any) -> Any:
        with autocast_to(self.dtype, self.world.device):
            return self._network(*inputs)

    def _update(self, lr: float) -> Tensor:
        set_lr(self.optimizer, lr)
        self._scaler.unscale_(self.optimizer)
        limit = self.config.clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True)
        if not self._scaler.is_enabled():
            skip_unless_finite(self.optimizer, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _state(self) -> dict[str, Any]:
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        return {"state.pt": state}

    def _load_state(self, folder: Path, saved_world_size: int) -> None:
        state = torch.load(folder / "state.pt", map_location=self.world.device, weights_only=True)
        self.module.load_state_dict(state["module"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _on_main(self, fragments: list[Fragment]) -> dict[str, Tensor] | None:
        return {f.name: f.tensor.detach().cpu().reshape(f.shape) for f in fragments} if self.world.is_main else None
