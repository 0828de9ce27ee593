"""`python -m orchestration.bench.preprocess_runs`: how close preprocessing comes to its encoder, what it leaks, how
fast shards load.

Prints one line of JSON for each part. Every figure is measured on pictures and an untrained network made here; nothing
is downloaded.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tyro
from PIL import Image
from torch import Tensor

from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig
from preprocess.build import Built, ShardBuilder
from preprocess.config import PreprocessConfig
from preprocess.encode import LatentEncoder
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure. The defaults suit a small CPU; a GPU wants more pictures, a larger batch and width 128."""

    device: str = "cpu"
    """cpu, or cuda to see how busy a GPU is kept."""
    num_images: int = 192
    """Pictures for the end-to-end figure; 0 leaves it out."""
    size: int = 128
    """Height and width of a sample."""
    base_width: int = 64
    """Width of the encoder (the published ones have 128)."""
    batch_size: int = 16
    threads: int = 2
    """Encoder threads on a CPU."""
    memory_images: int = 20_000
    """Samples for the memory figure; 0 leaves it out."""
    loader_samples: int = 2_048
    """Samples for the loader figure; 0 leaves it out."""
    work_dir: str = ""
    """Where to put the pictures and shards; empty: the system's temporary place."""


def main(argv: list[str]) -> int:
    """Run the benchmark and print its figures."""
    config = tyro.cli(BenchConfig, prog="python -m orchestration.bench.preprocess_runs", args=argv)
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-", dir=config.work_dir or None) as folder:
        _show("machine", _machine(config))
        if config.num_images:
            _show("encode", measure_encode(config, Path(folder)))
        if config.loader_samples:
            _show("loader", measure_loader(config, Path(folder)))
        if config.memory_images:
            _show("memory", measure_memory(config, Path(folder)))
    return 0


def _show(name: str, figures: dict[str, Any]) -> None:
    print(json.dumps({name: figures}), flush=True)


def _machine(config: BenchConfig) -> dict[str, Any]:
    device = torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else platform.processor()
    return {"device": device or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}


def make_pictures(folder: Path, num: int, height: int, width: int) -> None:
    """JPEG pictures with the detail of photographs: smooth shapes and some noise."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(num):
        coarse = Image.fromarray(random.integers(0, 255, (8, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.normal(0, 6, smooth.shape).astype(np.int16)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=90)


def measure_encode(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Images/s of the whole command against the encoder alone on ready tensors: same batch, threads and flips."""
    make_pictures(folder / "pictures", config.num_images, config.size * 5 // 4, config.size * 2)
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(base_width=config.base_width), has_decoder=False).eval()
    options = PreprocessConfig(
        source_url=str(folder / "pictures"), dest=str(folder / "encode"), size=config.size,
        batch_size=config.batch_size, encode_threads=config.threads, samples_per_shard=4 * config.batch_size,
        device=config.device,
    ).with_crop()  # fmt: skip
    LatentEncoder(autoencoder, options)  # places the network and sets the threads
    num_batches = max(2, config.num_images // config.batch_size // 2)
    before, cpu_before = _encoder_rate(autoencoder, options, num_batches)
    cpu = time.process_time()
    summary = preprocess(options, autoencoder=autoencoder)
    cpu = time.process_time() - cpu
    after, cpu_after = _encoder_rate(autoencoder, options, num_batches)
    alone = (before + after) / 2
    return {
        "encoder_images_per_second": round(alone, 2),
        "end_to_end_images_per_second": summary.samples_per_second,
        "ratio": round(summary.samples_per_second / alone, 3),
        "ratio_of_processor_time": round((cpu_before + cpu_after) / 2 * summary.num_samples / cpu, 3),
        "encode_busy": summary.encode_busy,
        "limited_by": summary.limited_by,
        "batch_size": config.batch_size,
        "size": config.size,
        "flips": True,
    }


@torch.inference_mode()
def _encoder_rate(autoencoder: Autoencoder, options: PreprocessConfig, num_batches: int) -> tuple[float, float]:
    """Images/s of the bare network, and processor seconds of one image (which a busy machine disturbs less).

    An image counts once, though its mirror is encoded too."""
    image = torch.randn(options.batch_size, 3, options.size, options.size, device=options.device)

    def run() -> None:
        autoencoder.moments(image)
        autoencoder.moments(image.flip(-1))

    run()
    cpu = time.process_time()
    seconds = _seconds(run, num_batches, options.device)
    cpu = (time.process_time() - cpu) / num_batches
    return options.batch_size / seconds, cpu / options.batch_size


def _seconds(action: Callable[[], object], num: int, device: str) -> float:
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(num):
        action()
    if is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / num


class ConstantEncoder:
    """Costs nothing, so that what is measured is everything else."""

    def __init__(self, latent_channels: int, levels: int) -> None:
        self.config = AutoencoderConfig(latent_channels=latent_channels, width_mult=(1,) * levels)

    def identity(self) -> str:
        return "constant"

    def moments(self, image: Tensor) -> Tensor:
        factor = self.config.factor
        repeats = -(-self.config.latent_channels // 3)
        return image[:, :, ::factor, ::factor].repeat(1, repeats, 1, 1)[:, : self.config.latent_channels].contiguous()


def measure_memory(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Growth of this process between the first and the last quarter of many samples, per 10 000 samples."""
    source = folder / "small"
    num_images = max(1, config.memory_images // 100)
    make_pictures(source, num_images, 96, 96)
    options = PreprocessConfig(
        source_url=str(source), dest=str(folder / "memory"), size=32, crops_per_image=100, crop_fraction=(0.5, 1.0),
        batch_size=config.batch_size, encode_threads=1, samples_per_shard=500,
    )  # fmt: skip
    process = psutil.Process()
    points: list[tuple[int, int]] = []
    done = 0
    original = ShardBuilder.build

    def watched(self: ShardBuilder, shards: Any) -> Any:
        nonlocal done
        built: Built
        for built in original(self, shards):
            done += built.num_samples
            if built.receipt is not None:
                points.append((done, process.memory_info().rss))
            yield built

    ShardBuilder.build = watched  # type: ignore[method-assign]
    try:
        summary = preprocess(options, autoencoder=ConstantEncoder(4, 3))
    finally:
        ShardBuilder.build = original  # type: ignore[method-assign]
    late = [point for point in points if point[0] >= config.memory_images // 4]
    slope = float(np.polyfit([n for n, _ in late], [rss for _, rss in late], 1)[0]) if len(late) > 2 else float("nan")
    return {
        "growth_bytes_per_10000_samples": round(slope * 10_000),
        "samples": summary.num_samples,
        "rss_megabytes": round(points[-1][1] / 1e6, 1),
        "samples_per_second_without_encoder": summary.samples_per_second,
    }


def measure_loader(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Samples/s of one core for cached latents of 4x32x32 (float16), and with 128-pixel PNG targets."""
    make_pictures(folder / "loader-pictures", 32, 160, 160)
    options = PreprocessConfig(
        source_url=str(folder / "loader-pictures"), dest=str(folder / "loader"), size=128, batch_size=64,
        crops_per_image=max(1, config.loader_samples // 32), crop_fraction=(0.5, 1.0), encode_threads=1,
    )  # fmt: skip
    preprocess(options, autoencoder=ConstantEncoder(4, 3))
    figures: dict[str, Any] = {}
    for name, pixels in (("latents", False), ("latents_and_pixels", True)):
        with ShardLoader(options.dest, batch_size=64, pixels=pixels, num_threads=1) as loader:
            stream = iter(loader)
            num_batches = max(1, loader.num_samples // 64) * (1 if pixels else 4)
            for _ in islice(stream, num_batches):  # the first pass checks every shard
                pass
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in islice(stream, num_batches):
                pass
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        figures[f"{name}_samples_per_core_second"] = round(num_batches * 64 / cpu)
        figures[f"{name}_samples_per_second"] = round(num_batches * 64 / wall)
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
