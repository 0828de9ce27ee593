"""Time and peak memory of a computation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from pipeline.errors import UserError

_RESET = Path("/proc/self/clear_refs")


def measure(
    run: Callable[[], object], *, device: torch.device | str = "cpu", num: int = 3, warm_up: int = 1
) -> tuple[float, int | None]:
    """(median seconds, peak bytes) of `num` runs after `warm_up` others.

    Memory is what the device allocator held at most on CUDA. On the CPU it is how far the process's resident memory
    rose above where it stood before, as Linux keeps its peak; None on systems that do not.
    """
    if num < 1:
        raise UserError(f"num = {num} is not allowed; use at least 1")
    is_cuda = torch.device(device).type == "cuda"
    before = _reset_peak(device, is_cuda)
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(num):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), _peak(device, is_cuda, before)


def wait_for(device: torch.device | str) -> None:
    """Until CUDA has done what it was given; a CPU is never behind."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device | str, is_cuda: bool) -> int | None:
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        _RESET.write_text("5")  # sets the peak back to the present size, see proc(5)
    except OSError:
        return None
    return int(psutil.Process().memory_info().rss)


def _peak(device: torch.device | str, is_cuda: bool, before: int | None) -> int | None:
    if is_cuda:
        return int(torch.cuda.max_memory_allocated(device))
    if before is None:
        return None
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    return max(0, peak - before)
