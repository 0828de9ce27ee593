"""The fused kernel's launch shapes on this GPU: which cut is fastest, and how far it is from the plain path."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from orchestration.bench import Options, Row, alternate, matrix_peak
from pipeline.geometry import axis_range
from pipeline.liif import LiifHead


@torch.inference_mode()
def bench_kernel(options: Options) -> list[Row]:
    """2048² from 64² at the paper's width, in the dtype of `options`. Without CUDA or Triton: one row that says so."""
    if not options.device.startswith("cuda") or importlib.util.find_spec("triton") is None:
        return [Row(part="kernel", name="not run", note="needs a CUDA device and Triton")]
    from pipeline.kernels import liif_triton

    dtype, side = getattr(torch, options.dtype), 2048
    torch.manual_seed(0)
    head = LiifHead(128, 256, 4).to(options.device)
    features = torch.randn(1, 128, 64, 64, device=options.device)
    axis = axis_range(0, side, side, 64, dtype=torch.float32, device=features.device)
    exact = head._block(head.table(features), axis.narrow(0, 64), axis)
    head = head.to(dtype)
    table = head.table(features.to(dtype))
    fixed = (table, axis, axis, head._later_layers(), head.out, head._position())
    plain = alternate({"": lambda: head.grid(table, axis, axis, chunk=1 << 17)}, options.rounds, options.device)[""]
    macs = side * side * 4 * (head.depth - 1) * head.width**2
    peak = matrix_peak(options, dtype)
    rows = [Row(part="kernel", name="plain PyTorch path", seconds=plain, ratio=1.0, share_of_peak=macs / plain / peak)]
    for launch in liif_triton.LAUNCHES:
        run = partial(liif_triton.render_liif, *fixed, launch=launch)
        name = f"{launch.pixels} pixels, {launch.num_warps} warps"
        try:
            seconds = alternate({"": run}, options.rounds, options.device)[""]
        except Exception as error:  # a launch that does not fit this GPU is a result, not a failure
            rows.append(Row(part="kernel", name=name, note=f"does not run: {str(error).splitlines()[0][:80]}"))
            continue
        rows.append(
            Row(
                part="kernel",
                name=name,
                rate=side * side / seconds / 1e6,
                unit="Mpixel/s",
                seconds=seconds,
                ratio=plain / seconds,
                share_of_peak=macs / seconds / peak,
                max_difference=float((run()[:, :, :64].float() - exact).abs().max()),
            )
        )
    return rows
