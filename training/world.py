"""The workers of one training run: who am I, and how do we agree. One process is a world of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError


@dataclass(frozen=True)
class World:
    """rank 0..size-1 of `size` workers; `local_rank` counts the workers of this machine."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a small float tensor over all workers, on the CPU."""
        if self.size == 1:
            return values.detach().cpu()
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return (total / self.size).cpu()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a small float tensor over all workers, on the CPU."""
        if self.size == 1:
            return values.detach().cpu()
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Everybody's picklable value, in rank order, on every worker."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Worker 0's picklable value on every worker."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def current_world(device: str | None = None) -> World:
    """The world that the launcher described in RANK, WORLD_SIZE and LOCAL_RANK (Ray Train, torchrun); one worker when
    there is none. Where the launcher has not made a process group yet, as torchrun does not, it is made here.

    device: "cpu", "cuda", or None for a CUDA device where one is visible. `UserError` for "cuda" where none is.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.device_count():  # asked of the driver: no context is opened
        raise UserError(
            "this process sees no CUDA device; train on the CPU, or look at the GPU's driver and at the "
            "build of PyTorch (latentzoom doctor)"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device(kind, local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)  # whatever asks for "cuda" without a number means this worker's
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        is_cuda = kind == "cuda"
        dist.init_process_group("nccl" if is_cuda else "gloo", device_id=chosen if is_cuda else None)
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), local_rank, chosen)
    return World(0, 1, 0, chosen)
