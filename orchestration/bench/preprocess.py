"""Preprocessing against a plain loop over the pictures, as rows of the table."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import orchestration.bench.preprocess_runs
from orchestration.bench.measure import macs_of
from orchestration.bench.table import Options, Row
from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig
from pipeline.metrics.speed import measure


def bench_preprocess(options: Options, peak: float) -> list[Row]:
    """Images/s of the whole command, against one loop that reads, encodes and saves batch after batch, and beside its
    encoder alone; and how fast shards are read back."""
    config = orchestration.bench.preprocess_runs.BenchConfig(
        device=options.device,
        threads=options.threads,
        num_images=32 if options.quick else 192,
        base_width=max(32, round(128 * options.width / 32) * 32),
        loader_samples=512 if options.quick else 4096,
    )
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        before = _encode_plainly(config, Path(folder), "before")
        figures: list[dict[str, float]] = []
        run = partial(orchestration.bench.preprocess_runs.measure_encode, config, Path(folder))
        memory = measure(lambda: figures.append(run()), device=options.device, num=1, warm_up=0)[1]
        plain = (before + _encode_plainly(config, Path(folder), "after")) / 2
        loader = orchestration.bench.preprocess_runs.measure_loader(config, Path(folder))
    encode = figures[0]
    whole = encode["end_to_end_images_per_second"]
    macs = 2 * _encoder_macs(config.base_width, config.size)  # of a picture and its mirror image
    rates = {"straightforward": plain, "whole command": whole, "encoder alone": encode["encoder_images_per_second"]}
    rows = [
        Row(
            part="preprocess",
            name=name,
            rate=rate,
            unit="images/s",
            memory_mb=memory / 1e6 if memory is not None and name == "whole command" else None,
            share_of_peak=rate * macs / peak,
            ratio=rate / plain,
            note="what the whole command can at most reach" if name == "encoder alone" else "",
        )
        for name, rate in rates.items()
    ]
    for key, name in (("latents", "load latents"), ("latents_and_pixels", "load latents and pixels")):
        rows.append(Row(part="preprocess", name=name, rate=loader[f"{key}_samples_per_second"], unit="samples/s"))
    return rows


@torch.inference_mode()
def _encode_plainly(config: orchestration.bench.preprocess_runs.BenchConfig, folder: Path, name: str) -> float:
    """Images/s of a script that does one thing after another: open, crop, encode with and without mirroring, save."""
    torch.manual_seed(0)
    autoencoder = _encoder(config.base_width).to(config.device).eval()
    pictures, target = folder / f"{name}-pictures", folder / name
    orchestration.bench.preprocess_runs.make_pictures(
        pictures, config.num_images, config.size * 5 // 4, config.size * 2
    )
    files = sorted(pictures.iterdir())
    target.mkdir()
    start = time.perf_counter()
    for first in range(0, len(files), config.batch_size):
        batch = files[first : first + config.batch_size]
        image = torch.stack([_read(file, config.size) for file in batch]).to(config.device)
        both = [autoencoder.moments(each).half().cpu().numpy() for each in (image, image.flip(-1))]
        for file, latent, mirrored in zip(batch, *both):
            np.save(target / f"{file.stem}.npy", np.stack([latent, mirrored]))
    return len(files) / (time.perf_counter() - start)


def _read(file: Path, size: int) -> Tensor:
    """The middle of a picture at size × size, (3,size,size) in [-1, 1]."""
    with Image.open(file) as picture:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.convert("RGB").resize(
            (size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
        )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1.0


def _encoder(base_width: int) -> Autoencoder:
    return Autoencoder(AutoencoderConfig(base_width=base_width), has_decoder=False)


def _encoder_macs(base_width: int, side: int) -> float:
    with torch.device("meta"):
        encoder, image = _encoder(base_width), torch.empty(1, 3, side, side)
        return macs_of(lambda: encoder.moments(image))
