"""Decoding, features cached: the heads against the straightforward evaluation of LIIF, by output size.

Shapes are the paper's: 128 feature channels, 64 × 64 cells, MLP of 4 × 256; `light` has 3 × 64. On a CPU, sizes are
timed in a band of 2^17 pixels as wide as the output, on CUDA whole. "straightforward" evaluates all of it at once (on
CUDA 2^18 pixels), "in chunks" the same 30 000 pixels at a time, as LIIF's own script does. Which of them is faster
depends on the machine; both are rows, and ratios are to the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from orchestration.bench.measure import alternate, autocast, observe, quality
from orchestration.bench.table import Options, Row
from pipeline.canvas import windows
from pipeline.config import DecoderConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.drawing import Drawing
from pipeline.geometry import Axis, Window, axis_range
from pipeline.light import LightHead
from pipeline.liif import LiifHead
from pipeline.reference import render_light_reference, render_reference
from pipeline.tiling import whole

CELLS = 64
CHANNELS = 128
BAND_PIXELS = 1 << 17
LARGEST = 1 << 15
"""Height and width of the picture that is drawn tile by tile."""


def bench_decode(options: Options, peak: float) -> list[Row]:
    """Rows for 512² and 1024², on CUDA also 2048² and LARGEST² (hours on a CPU); in half precision the straightforward
    way runs under autocast.
    peak: multiply-accumulates a second of the device's matrix products."""
    is_cuda = options.device.startswith("cuda")
    torch.manual_seed(0)
    liif, light = LiifHead(CHANNELS, 256, 4).to(options.device), LightHead(CHANNELS, 64, 3).to(options.device)
    features = torch.randn(1, CHANNELS, CELLS, CELLS, device=options.device)
    rows = []
    for side in [512] if options.quick else [512, 1024, 2048] if is_cuda else [512, 1024]:
        rows += _rows(options, side, {"liif": liif, "light": light}, features, peak)
    if not options.quick:
        rows += [_whole(options, "light", light, features, 4096, peak)]
        rows += [_whole(options, "liif", liif, features, 4096, peak), tile_by_tile(options, peak)] if is_cuda else []
    return rows


@torch.inference_mode()
def _rows(
    options: Options, side: int, heads: dict[str, LiifHead | LightHead], features: Tensor, peak: float
) -> list[Row]:
    num_rows = side if options.device.startswith("cuda") else min(side, max(1, BAND_PIXELS // side))
    top = (side - num_rows) // 2
    window, num_pixels = (top, 0, top + num_rows, side), num_rows * side
    runs = _straightforward(options, side, window, heads["liif"], features, num_pixels)
    for name, head in heads.items():
        runs[name] = _fast(options, head, features, side, window)
    seconds = alternate(runs, options.rounds, options.device)
    exact = {
        "liif": render_reference(_liif(heads["liif"]), features, (side, side), window),
        "light": render_light_reference(_light(heads["light"]), features, (side, side), window),
    }
    rows = []
    for name, run in runs.items():
        image, memory = observe(run, options.device)
        difference, psnr = quality(exact[name if name in exact else "liif"], image)
        macs = heads[name if name in heads else "liif"].macs_per_pixel(side / CELLS)
        rows.append(
            Row(
                part="decode",
                name=f"{name} {side}²",
                rate=num_pixels / seconds[name] / 1e6,
                unit="Mpixel/s",
                seconds=seconds[name] * side / num_rows,
                memory_mb=memory,
                share_of_peak=num_pixels * macs / seconds[name] / peak,
                ratio=seconds["straightforward"] / seconds[name],
                max_difference=difference,
                psnr_change=psnr,
            )
        )
    return rows


def _straightforward(
    options: Options,
    side: int,
    window: tuple[int, int, int, int],
    head: LiifHead | LightHead,
    features: Tensor,
    num_pixels: int,
) -> dict[str, Callable[[], Tensor]]:
    def in_chunks(chunk: int) -> Callable[[], Tensor]:
        return autocast(lambda: render_reference(_liif(head), features, (side, side), window, chunk=chunk), options)

    at_once = 1 << 18 if options.device.startswith("cuda") else num_pixels
    return {"straightforward": in_chunks(at_once), "in chunks": in_chunks(30_000)}


def _fast(
    options: Options, head: LiifHead | LightHead, features: Tensor, side: int, window: tuple[int, int, int, int]
) -> Callable[[], Tensor]:
    """The head in the dtype of `options`, its table computed once."""
    dtype = getattr(torch, options.dtype)
    head = _copy(head).to(dtype)
    table = head.table(features.to(dtype))
    rows, cols = _axis(window[0], window[2], side, table), _axis(window[1], window[3], side, table)
    return lambda: head.grid(table, rows, cols)


@torch.inference_mode()
def _whole(
    options: Options,
    name: str,
    head: LiifHead | LightHead,
    features: Tensor,
    side: int,
    peak: float,
    rounds: int = 1,
) -> Row:
    """A whole large image: memory beyond the image itself stays that of the chunk."""
    run = _fast(options, head, features, side, (0, 0, side, side))
    seconds = alternate({name: run}, rounds, options.device)[name]
    image, memory = observe(run, options.device)
    return Row(
        part="decode",
        name=f"{name} {side}² whole",
        rate=side * side / seconds / 1e6,
        unit="Mpixel/s",
        seconds=seconds,
        memory_mb=None if memory is None else max(0.0, memory - image.numel() * image.element_size() / 1e6),
        share_of_peak=side * side * head.macs_per_pixel(side / CELLS) / seconds / peak,
        note="memory without the image itself",
    )


def liif_alone(options: Options, peak: float, side: int) -> Row:
    """`liif` at side² whole, without the straightforward way beside it."""
    torch.manual_seed(0)
    head = LiifHead(CHANNELS, 256, 4).to(options.device)
    features = torch.randn(1, CHANNELS, CELLS, CELLS, device=options.device)
    return _whole(options, "liif", head, features, side, peak, options.rounds)


@torch.inference_mode()
def tile_by_tile(options: Options, peak: float, side: int = LARGEST) -> Row:
    """side² as `latentzoom generate` draws it, features made anew: 8-bit tiles reach the CPU, and no file."""
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    decoder = ImplicitDecoder(DecoderConfig(), 3).to(options.device, dtype).eval()
    latent = torch.randn(1, 3, CELLS, CELLS).to(options.device, dtype)
    tiles = list(windows((side, side)))
    seconds = 0.0

    def draw(tiles: list[Window]) -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        drawing = Drawing(decoder, latent, (side, side), whole((CELLS, CELLS)))
        for tile in tiles:
            pixels = drawing.pixels(tile)
        seconds = time.perf_counter() - start
        return torch.from_numpy(pixels)

    draw(tiles[:1])  # warm up
    memory = observe(lambda: draw(tiles), options.device)[1]
    return Row(
        part="decode",
        name=f"liif {side}² tile by tile",
        rate=side**2 / seconds / 1e6,
        unit="Mpixel/s",
        seconds=seconds,
        memory_mb=memory,
        share_of_peak=side**2 * decoder.head.macs_per_pixel(side / CELLS) / seconds / peak,
        note="memory beyond the weights; the picture is not kept",
    )


def _axis(start: int, stop: int, side: int, table: Tensor) -> Axis:
    return axis_range(start, stop, side, CELLS, dtype=torch.float32, device=table.device)


def _copy(head: LiifHead | LightHead) -> LiifHead | LightHead:
    fresh = type(head)(head.feature_channels, head.width, head.depth).to(head.out.weight.device)
    fresh.load_state_dict(head.state_dict())
    return fresh


def _liif(head: LiifHead | LightHead) -> LiifHead:
    assert isinstance(head, LiifHead)
    return head


def _light(head: LiifHead | LightHead) -> LightHead:
    assert isinstance(head, LightHead)
    return head
