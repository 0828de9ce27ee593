"""The starter model as people use it: a small picture to ×4 at once, a 12-megapixel photograph to ×2 tile by tile.

"straightforward" is the same network the plain way: D_phi over the whole picture, then every corner of every pixel of
the `light` head sampled by `grid_sample`, 30 000 pixels at a time.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from orchestration.bench.measure import alternate, observe, quality
from orchestration.bench.table import Options, Row
from pipeline.allocator import keep_freed_memory
from pipeline.canvas import windows
from pipeline.images import from_uint8, to_uint8
from pipeline.light import LightHead
from pipeline.model import LatentZoom
from pipeline.reference import render_light_reference

SMALL = (320, 480)
LARGE = (3000, 4000)


def bench_starter(options: Options, peak: float) -> list[Row]:
    """Rows for SMALL ×4 and, without `quick`, LARGE ×2. peak is not used: see the rows of `decode`."""
    model = LatentZoom.starter(device=options.device, dtype=getattr(torch, options.dtype))
    with keep_freed_memory():  # as `upscale` does
        rows = _small(options, model)
        return rows if options.quick else [*rows, _large(options, model)]


@torch.inference_mode()
def _small(options: Options, model: LatentZoom) -> list[Row]:
    exact = LatentZoom.starter(device=options.device)
    assert exact.decoder is not None and isinstance(exact.decoder.head, LightHead)
    light = exact.decoder.head
    picture = _picture(SMALL).to(options.device)
    size = SMALL[0] * 4, SMALL[1] * 4
    image = from_uint8(picture)

    def plain() -> Tensor:
        return from_uint8(to_uint8(render_light_reference(light, exact.features(image), size)))

    def ours() -> Tensor:
        latent = model.condition(image) / model.config.scale_factor
        return from_uint8(torch.from_numpy(model.drawing(latent, size).pixels((0, 0, *size))).permute(2, 0, 1)[None])

    seconds = alternate({"straightforward": plain, "starter": ours}, options.rounds, options.device)
    truth = plain().cpu()
    rows = []
    for name, run in (("straightforward", plain), ("starter", ours)):
        result, memory = observe(run, options.device)
        difference, psnr = quality(truth, result.cpu())
        rows.append(
            Row(
                part="starter",
                name=f"{name} {SMALL[0]}x{SMALL[1]} ×4",
                rate=size[0] * size[1] / seconds[name] / 1e6,
                unit="Mpixel/s",
                seconds=seconds[name],
                memory_mb=memory,
                ratio=seconds["straightforward"] / seconds[name],
                max_difference=difference,
                psnr_change=psnr,
                note="8-bit pictures: a level is 0.008",
            )
        )
    return rows


def _large(options: Options, model: LatentZoom) -> Row:
    """Every window of LARGE ×2, in the order of a file; pixels are not kept."""
    size = LARGE[0] * 2, LARGE[1] * 2
    picture, seconds = _picture(LARGE), 0.0

    def draw() -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        latent = model.condition(from_uint8(picture), model.tiling()) / model.config.scale_factor
        drawing = model.drawing(latent, size)
        for window in windows(size):
            pixels = drawing.pixels(window)
        seconds = time.perf_counter() - start
        return torch.from_numpy(pixels)

    memory = observe(draw, options.device)[1]
    return Row(
        part="starter",
        name=f"starter {LARGE[0]}x{LARGE[1]} ×2",
        rate=size[0] * size[1] / seconds / 1e6,
        unit="Mpixel/s",
        seconds=seconds,
        memory_mb=memory,
        note="tile by tile; memory with the input as float32, without the file",
    )


def _picture(size: tuple[int, int]) -> Tensor:
    """Smooth shapes with noise, uint8 (1,3,H,W)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((1, 3, 9, 13), generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return to_uint8(smooth + 0.05 * torch.randn((1, 3, *size), generator=generator))
