"""Decoding, features cached: the heads against the straightforward evaluation of LIIF, by output size.

Shapes are the paper's: 128 feature channels, 64 × 64 cells, MLP of 4 × 256; `light` has 3 × 64. Large sizes are timed
in a band of rows as wide as the output, which every path evaluates as it would the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orchestration.bench import Options, Row, alternate, matrix_peak
from pipeline.geometry import Axis, axis_range
from pipeline.light import LightHead
from pipeline.liif import LiifHead
from pipeline.metrics.speed import measure
from pipeline.reference import render_reference

CELLS = 64
CHANNELS = 128
BAND_PIXELS = 60_000


def bench_decode(options: Options) -> list[Row]:
    """Rows for 512² and 1024², on CUDA also 2048²; in half precision the straightforward way runs under autocast."""
    dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    torch.manual_seed(0)
    liif, light = LiifHead(CHANNELS, 256, 4).to(device), LightHead(CHANNELS, 64, 3).to(device)
    features = torch.randn(1, CHANNELS, CELLS, CELLS, device=device)
    peak = matrix_peak(options, dtype)
    rows = [
        Row(part="decode", name="matrix product", rate=peak / 1e9, unit="GMAC/s", note="measured peak of this device")
    ]
    sizes = [512] if options.quick else [512, 1024, 2048] if device.type == "cuda" else [512, 1024]
    for side in sizes:
        rows += _rows(options, dtype, side, liif, light, features, peak)
    if not options.quick:
        rows.append(_whole(dtype, light, features, 4096))
    return rows


@torch.inference_mode()
def _rows(
    options: Options,
    dtype: torch.dtype,
    side: int,
    liif: LiifHead,
    light: LightHead,
    features: Tensor,
    peak: float,
) -> list[Row]:
    device = features.device
    num_rows = side if device.type == "cuda" else min(side, max(1, BAND_PIXELS // side))
    top = (side - num_rows) // 2
    window = (top, 0, top + num_rows, side)

    def straightforward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return render_reference(liif, features, (side, side), window)

    renders: dict[str, Callable[[], Tensor]] = {"straightforward": straightforward}
    for name, head in (("liif", liif), ("light", light)):
        fast = head if dtype == torch.float32 else _copy(head).to(dtype)
        table = fast.table(features.to(dtype))
        grid = [_axis(a, b, side, table) for a, b in ((window[0], window[2]), (window[1], window[3]))]
        renders[name] = lambda fast=fast, table=table, grid=grid: fast.grid(table, *grid)  # type: ignore[misc]
    exact = render_reference(liif, features, (side, side), window)
    quality = _quality(exact, renders["liif"]())
    seconds = alternate(renders, options.rounds, options.device)
    num_pixels = num_rows * side
    scale = side / CELLS
    result = []
    for name, run in renders.items():
        memory = measure(run, device=device, num=1)[1]
        head = light if name == "light" else liif
        macs = head.macs_per_pixel(scale)
        result.append(
            Row(
                part="decode",
                name=f"{name} {side}²",
                rate=num_pixels / seconds[name] / 1e6,
                unit="Mpixel/s",
                seconds=seconds[name] * side / num_rows,
                memory_mb=None if memory is None else memory / 1e6,
                share_of_peak=num_pixels * macs / seconds[name] / peak,
                ratio=seconds["straightforward"] / seconds[name],
                max_difference=quality[0] if name == "liif" else None,
                psnr_change=quality[1] if name == "liif" else None,
            )
        )
    return result


@torch.inference_mode()
def _whole(dtype: torch.dtype, light: LightHead, features: Tensor, side: int) -> Row:
    """A whole large image: memory beyond the image itself stays that of the chunk."""
    head = _copy(light).to(dtype)
    table = head.table(features.to(dtype))
    axis = _axis(0, side, side, table)
    seconds, memory = measure(lambda: head.grid(table, axis, axis), device=features.device, num=1)
    image_bytes = 3 * side * side * table.element_size()
    return Row(
        part="decode",
        name=f"light {side}² whole",
        rate=side * side / seconds / 1e6,
        unit="Mpixel/s",
        seconds=seconds,
        memory_mb=None if memory is None else (memory - image_bytes) / 1e6,
        note="memory without the image itself",
    )


def _quality(exact: Tensor, image: Tensor) -> tuple[float, float]:
    """Largest difference, and the change of PSNR against a picture 30 dB from the exact one (range [-1, 1])."""
    image = image.float()
    picture = exact + torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)).to(exact) * 2 * 10**-1.5
    error, exact_error = ((each - picture).double().square().mean() for each in (image, exact))
    return float((image - exact).abs().max()), float(10 * torch.log10(exact_error / error))


def _axis(start: int, stop: int, side: int, table: Tensor) -> Axis:
    return axis_range(start, stop, side, CELLS, dtype=table.dtype, device=table.device)


def _copy(head: LiifHead | LightHead) -> LiifHead | LightHead:
    fresh = type(head)(head.feature_channels, head.width, head.depth).to(head.out.weight.device)
    fresh.load_state_dict(head.state_dict())
    return fresh
