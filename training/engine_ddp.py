"""Several processes, each with the whole network and optimizer: PyTorch's distributed data parallel.

For models of some hundred million parameters, whose optimizer state fits each GPU, this is all that is needed. Its
checkpoints are those of one process, so a run may go on with any number of workers, or alone.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from training.config import StageConfig
from training.engine_local import LocalEngine
from training.world import World


class DdpEngine(LocalEngine):
    """See `training.engine.Engine`. Uses the process group that exists already (gloo or nccl)."""

    def __init__(self, module: nn.Module, config: StageConfig, world: World, accumulation: int) -> None:
        if not dist.is_initialized():
            raise UserError("several workers need a process group; start them by Ray Train or torchrun")
        super().__init__(module, config, world, accumulation)
        self._network = self._parallel = DistributedDataParallel(
            self.module,
            device_ids=None,  # else it would bring what is meant for the host, a lattice's places, to the device
            broadcast_buffers=False,  # none of the networks has buffers that learn
            gradient_as_bucket_view=True,
        )
        self._micro = 0

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._micro = (self._micro + 1) % self.accumulation

    def _forward(self, *inputs: Any) -> Any:
        # Gradients are added up over the micro-batches and averaged over the workers during the last one's backward.
        self._parallel.require_backward_grad_sync = self._micro == self.accumulation - 1
        return super()._forward(*inputs)

    def _state(self) -> dict[str, Any]:
        """All workers hold the same: the main one writes it."""
        return super()._state() if self.world.is_main else {}
