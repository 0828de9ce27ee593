"""The fused kernel's launch shapes on this GPU: which cut is fastest, and how far it is from the plain path."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from orchestration.bench.measure import alternate, observe, quality
from orchestration.bench.table import Options, Row
from pipeline.geometry import axis_range
from pipeline.liif import LiifHead

SIDE = 2048
CELLS = 64
_CHECKED_ROWS = 64


@torch.inference_mode()
def bench_kernel(options: Options, peak: float) -> list[Row]:
    """2048² from 64² at the paper's width, in the dtype of `options`. Without CUDA or Triton: one row that says so.

    Shares of the peak count the products of hidden layers alone (the most of the work, and all that is left of it where
    the first layer is a table)."""
    if not options.device.startswith("cuda") or importlib.util.find_spec("triton") is None:
        return [Row(part="kernel", name="not run", note="needs a CUDA device and Triton")]
    from pipeline.kernels import liif_triton

    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    head = LiifHead(128, 256, 4).to(options.device)
    features = torch.randn(1, 128, CELLS, CELLS, device=options.device)
    axis = axis_range(0, SIDE, SIDE, CELLS, dtype=torch.float32, device=features.device)
    exact = head._block(head.table(features), axis.narrow(0, _CHECKED_ROWS), axis)
    head = head.to(dtype)
    table = head.table(features.to(dtype))
    fixed = (table, axis, axis, head._later_layers(), head.out, head._position())
    plain = partial(head.grid, table, axis, axis, chunk=1 << 17)
    runs: dict[str, Callable[[], Tensor]] = {"plain PyTorch path": plain}
    for launch in liif_triton.LAUNCHES:
        name = f"{launch.pixels} pixels, {launch.num_warps} warps"
        runs[name] = partial(liif_triton.render_liif, *fixed, launch=launch)
    macs = SIDE * SIDE * 4 * (head.depth - 1) * head.width**2
    return _rows(options, runs, exact, SIDE**2, macs / peak) + _gradient_rows(options, peak)


@torch.inference_mode(False)
@torch.enable_grad()
def _gradient_rows(options: Options, peak: float) -> list[Row]:
    """The table's gradient at 512², the head frozen as in alignment stage 2: there and back by the plain path, then as
    training does it. Differences are to the float32 gradient, in units of its largest entry: half precision turns some
    ReLUs on or off, on either path."""
    dtype, side = getattr(torch, options.dtype), SIDE // 4
    torch.manual_seed(0)
    head = LiifHead(128, 256, 4).to(options.device).requires_grad_(False)
    features = torch.randn(1, 128, CELLS, CELLS, device=options.device)
    axis = axis_range(0, side, side, CELLS, dtype=torch.float32, device=features.device)
    weight = torch.linspace(-9, 9, 3 * side * side, device=options.device).sin().reshape(1, 3, side, side)

    def gradient(head: LiifHead, chunk: int | None) -> Tensor:
        table = head.table(features.to(head.out.weight.dtype)).detach().requires_grad_()
        image = head.grid(table, axis, axis, chunk=chunk)
        return torch.autograd.grad((image.float() * weight).sum(), table)[0]

    exact = gradient(head, 1 << 15)
    largest = exact.abs().max()
    low = copy.deepcopy(head).to(dtype)
    runs: dict[str, Callable[[], Tensor]] = {
        f"gradient {side}², plain path": lambda: gradient(low, 1 << 15) / largest,
        f"gradient {side}², fused": lambda: gradient(low, None) / largest,
    }
    macs = 3 * side * side * 4 * (head.depth - 1) * head.width**2  # there, there again, and back
    return _rows(options, runs, exact / largest, side**2, macs / peak)


def _rows(
    options: Options, runs: dict[str, Callable[[], Tensor]], exact: Tensor, num_pixels: int, peak_seconds: float
) -> list[Row]:
    """Of images (1,3,H,W), whose first rows `exact` has, or gradients (1,h,w,D), which it has whole. The first of
    `runs` is what the others are compared with. One that does not run becomes a row that says so."""
    rows, slow = [], None
    for name, run in runs.items():
        try:
            seconds = alternate({name: run}, options.rounds, options.device)[name]
            image, memory = observe(run, options.device)
        except Exception as error:  # a launch that does not fit this GPU is a result, not a failure
            if slow is None:
                raise
            rows.append(Row(part="kernel", name=name, note=f"does not run: {(str(error) or repr(error))[:80]}"))
            continue
        slow = slow or seconds
        difference, psnr = quality(exact, image[:, :, : exact.shape[2]])
        rows.append(
            Row(
                part="kernel",
                name=name,
                rate=num_pixels / seconds / 1e6,
                unit="Mpixel/s",
                seconds=seconds,
                memory_mb=memory,
                ratio=slow / seconds,
                share_of_peak=peak_seconds / seconds,
                max_difference=difference,
                psnr_change=psnr if exact.shape[1] == 3 else None,
            )
        )
    return rows
