"""Steps of the two alignment stages against the straightforward way to train, as rows of the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from orchestration.bench.align import KINDS, align_step, narrow_preset, render_plainly
from orchestration.bench.measure import alternate, apart, autocast, macs_of, observe
from orchestration.bench.table import Options, Row
from pipeline.bundle import build_autoencoder, build_decoder
from training.targets import draw_target

BATCH = 2
"""Images a training step."""


def bench_stage1(options: Options, peak: float) -> list[Row]:
    """Training steps of alignment stage 1 at the full size: cached latents and the preset's window of the target,
    against encoding the images and rendering the whole target plainly. In half precision under autocast."""
    preset = narrow_preset(options.width, BATCH)
    model, side = preset.model, preset.model.image_size
    torch.manual_seed(0)
    encoder = build_autoencoder(model).to(options.device).requires_grad_(False)
    decoder = build_decoder(model).to(options.device).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-6)
    pixels = torch.rand(BATCH, 3, side, side, device=options.device) * 2 - 1
    target = draw_target(dataclasses.replace(preset.decoder, min_size=side, max_size=side), model, 0)
    y0, x0, y1, x1 = target.window
    with torch.no_grad():
        cached = encoder.encode(pixels)

    def plainly() -> Tensor:
        with torch.no_grad():
            latent = encoder.encode(pixels)
        return render_plainly(decoder, latent, (side, side))

    whole = autocast(plainly, options)
    part = autocast(lambda: decoder(cached, target.size, target.window), options)

    def learn(image: Tensor, truth: Tensor) -> Tensor:
        (image - truth).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return image.detach()

    def straightforward() -> Tensor:
        image = learn(whole(), pixels)
        return image[:, :, y0:y1, x0:x1]

    def ours() -> Tensor:
        return learn(part(), target.truth(pixels))

    with torch.no_grad():
        exact = render_plainly(decoder, cached, (side, side))[:, :, y0:y1, x0:x1]
    # With gradient: on CUDA that is another kernel than without.
    differences = {
        name: float((image.detach() - exact).abs().max())
        for name, image in (("straightforward", whole()[:, :, y0:y1, x0:x1]), ("ours", part()))
    }
    runs: dict[str, Callable[[], Tensor]] = {"straightforward": straightforward, "ours": ours}
    seconds = alternate(runs, options.rounds, options.device)
    return [
        Row(
            part="stage1",
            name=f"{name} step",
            rate=BATCH / seconds[name],
            unit="images/s",
            seconds=seconds[name],
            memory_mb=observe(run, options.device)[1],
            share_of_peak=macs_of(run) / seconds[name] / peak,
            ratio=seconds["straightforward"] / seconds[name],
            max_difference=differences[name],
            note=f"of {side}² pixels, {y1 - y0}×{x1 - x0} are rendered" if name == "ours" else "",
        )
        for name, run in runs.items()
    ]


def bench_stage2(options: Options, peak: float) -> list[Row]:
    """Training steps of alignment stage 2, as `orchestration.bench.align` has them: each way in a process of its own,
    in float32, on a CPU by the processor time of one thread, which is steadier than the clock on the wall."""
    del peak  # the processes report no operations
    preset = narrow_preset(options.width, BATCH)
    steps = 1 if options.quick else options.rounds
    taken = {kind: apart(align_step, kind, preset, options.device, steps) for kind in KINDS}
    unit = "images/s" if options.device.startswith("cuda") else "images/core s"
    return [
        Row(
            part="stage2",
            name=f"{kind} step",
            rate=BATCH / figures["seconds"],
            unit=unit,
            seconds=figures["seconds"],
            memory_mb=figures["memory_mb"] * 2**20 / 1e6,
            ratio=taken["straightforward"]["seconds"] / figures["seconds"],
        )
        for kind, figures in taken.items()
    ]
