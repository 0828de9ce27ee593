"""The parts that other rooms measure themselves, as rows of the same table: preprocessing and the alignment stages."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import preprocess.bench
import training.bench
from orchestration.bench import Options, Row, alternate
from pipeline.bundle import build_autoencoder, build_decoder
from pipeline.resize import resize
from training.targets import draw_target


def bench_preprocess(options: Options) -> list[Row]:
    """Images/s of the whole command against its encoder alone, and how fast shards are read back."""
    quick = options.quick
    config = preprocess.bench.BenchConfig(
        device=options.device,
        threads=options.threads,
        num_images=48 if quick else 192,
        base_width=max(32, round(128 * options.width / 32) * 32),
        loader_samples=1024 if quick else 8192,
    )
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        encode = preprocess.bench.measure_encode(config, Path(folder))
        loader = preprocess.bench.measure_loader(config, Path(folder))
    rows = [
        Row(
            part="preprocess",
            name=name,
            rate=encode[f"{key}_images_per_second"],
            unit="images/s",
            ratio=encode["ratio"] if key == "end_to_end" else 1.0,
            note="ratio: share of the bare encoder's rate" if key == "end_to_end" else "",
        )
        for key, name in (("encoder", "encoder alone"), ("end_to_end", "whole command"))
    ]
    for key, name in (("latents", "load latents"), ("latents_and_pixels", "load latents and pixels")):
        rows.append(Row(part="preprocess", name=name, rate=loader[f"{key}_samples_per_second"], unit="samples/s"))
    return rows


def bench_stage1(options: Options) -> list[Row]:
    """Training steps of alignment stage 1: cached latents and a window of the target, against encoding the image and
    rendering the whole target plainly."""
    preset = training.bench.narrow_preset(options.width, 2)
    model, config, device = preset.model, preset.decoder, torch.device(options.device)
    torch.manual_seed(0)
    encoder = build_autoencoder(model).to(device).requires_grad_(False)
    decoder = build_decoder(model).to(device)
    side = model.image_size
    pixels = torch.rand(2, 3, side, side, device=device) * 2 - 1
    with torch.no_grad():
        cached = encoder.encode(pixels)
    steps = iter(range(10**6))

    def straightforward() -> None:
        with torch.no_grad():
            latent = encoder.encode(pixels)
        _backward(training.bench.render_plainly(decoder, latent, (side, side)), pixels)

    def ours() -> None:
        target = draw_target(config, model, next(steps))
        _backward(decoder(cached, target.size, target.window), resize(pixels, target.size), target.window)

    def _backward(image: Tensor, truth: Tensor, window: tuple[int, int, int, int] | None = None) -> None:
        y0, x0, y1, x1 = window or (0, 0, *truth.shape[2:])
        decoder.zero_grad()
        (image - truth[:, :, y0:y1, x0:x1]).abs().mean().backward()

    seconds = alternate({"straightforward": straightforward, "ours": ours}, options.rounds, options.device)
    return [
        Row(
            part="stage1",
            name=f"{name} step",
            rate=2 / taken,
            unit="images/s",
            seconds=taken,
            ratio=seconds["straightforward"] / taken,
        )
        for name, taken in seconds.items()
    ]


def bench_stage2(options: Options) -> list[Row]:
    """Training steps of alignment stage 2, as `training.bench` measures them: ratios of speed and memory."""
    arguments = argparse.Namespace(
        device=options.device,
        width=max(0.125, options.width),  # below that, the networks are too small to see in a process's memory
        batch=2,
        steps=1 if options.quick else options.rounds,
    )
    with contextlib.redirect_stdout(sys.stderr):
        ratios = training.bench.bench_align(arguments)
    kinds = [key.removeprefix("align_").removesuffix("_speed") for key in ratios if key.endswith("_speed")]
    return [
        Row(
            part="stage2",
            name=f"{kind} step",
            ratio=ratios[f"align_{kind}_speed"],
            note=f"{ratios[f'align_{kind}_memory']:.2f} of the straightforward memory",
        )
        for kind in kinds
    ]
