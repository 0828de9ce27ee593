"""How `latentzoom bench` measures: in turn, beside the device's own matrix rate, with the quality shown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orchestration.bench.table import Options
from pipeline.metrics.speed import measure, wait_for


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each run. One of each to warm up, then in turn, so that a change in the machine's speed
    meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def matrix_peak(options: Options) -> float:
    """Multiply-accumulates a second of large matrix products in the dtype of `options`: the best of a few sizes."""
    best, dtype = 0.0, getattr(torch, options.dtype)
    for side in (4096, 8192) if options.device.startswith("cuda") else (512, 1024, 2048):
        a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        for _ in range(8):  # the fastest counts: other programs only ever make it slower
            wait_for(options.device)
            start = time.perf_counter()
            torch.mm(a, b, out=product)
            wait_for(options.device)
            best = max(best, side**3 / (time.perf_counter() - start))
    return best


def observe(run: Callable[[], Tensor], device: str) -> tuple[Tensor, float | None]:
    """What one run gives, and its peak memory in MB beyond what stood before (of the process on a CPU, of the device on
    CUDA); None where the system does not tell."""
    results: list[Tensor] = []
    _give_back_memory()
    stood = torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0
    peak = measure(lambda: results.append(run()), device=device, num=1, warm_up=0)[1]
    return results[0], None if peak is None else max(0, peak - stood) / 1e6


def autocast(run: Callable[[], Tensor], options: Options) -> Callable[[], Tensor]:
    """In the dtype of `options` as scripts have it: the weights stay float32."""
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)

    def cast() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return run()

    return cast


def macs_of(run: Callable[[], object]) -> float:
    """Multiply-accumulates of the matrix products, convolutions and attention in a run, counted by PyTorch."""
    # Fused attention on a CPU is not counted; the plain one is, and does as many.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / 2


def quality(exact: Tensor, image: Tensor) -> tuple[float, float]:
    """Largest difference of an image (B,3,H,W) to the float32 reference `exact`, in units of [-1, 1], and what it
    changes the PSNR by, in dB, where that is 30 dB: against a picture that far from the exact one."""
    image = image.float()
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).to(exact)
    picture = exact + 2 * 10**-1.5 * noise
    error, exact_error = ((each - picture).double().square().mean() for each in (image, exact))
    return float((image - exact).abs().max()), float(10 * torch.log10(exact_error / error))


def apart(function: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """In a fresh process: what a process once held stays in its heap, and its peak never falls on some systems."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _give_back_memory() -> None:
    """What earlier runs freed but the C library still holds would hide what the next one takes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
