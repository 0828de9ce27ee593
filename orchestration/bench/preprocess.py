"""Preprocessing against a plain loop over the pictures, as rows of the table."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from orchestration.bench.inputs import ConstantEncoder, make_pictures
from orchestration.bench.measure import macs_of
from orchestration.bench.table import Options, Row
from pipeline.autoencoder import Autoencoder
from pipeline.config import AutoencoderConfig
from pipeline.metrics.speed import measure, wait_for
from preprocess.config import PreprocessConfig
from preprocess.encode import LatentEncoder
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader

SIDE = 128
"""Height and width of a sample."""
BATCH = 16


def bench_preprocess(options: Options, peak: float) -> list[Row]:
    """Images/s of the whole command, against one loop that reads, encodes and saves batch after batch, and beside its
    encoder alone; and how fast shards are read back."""
    base_width = max(32, round(128 * options.width / 32) * 32)
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as name:
        folder = Path(name)
        pictures = folder / "pictures"
        make_pictures(pictures, 32 if options.quick else 192, SIDE * 5 // 4, SIDE * 2)
        before = _encode_plainly(options.device, base_width, pictures, folder / "before")
        rates: dict[str, float] = {}
        run = partial(_encode, options, base_width, pictures, folder / "encode")
        memory = measure(lambda: rates.update(run()), device=options.device, num=1, warm_up=0)[1]
        after = _encode_plainly(options.device, base_width, pictures, folder / "after")
        loaded = _load(folder, 512 if options.quick else 4096)
    plain = (before + after) / 2
    macs = 2 * _encoder_macs(base_width, SIDE)  # of a picture and its mirror image
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
        for name, rate in {"straightforward": plain, **rates}.items()
    ]
    return rows + [Row(part="preprocess", name=name, rate=rate, unit="samples/s") for name, rate in loaded.items()]


def _encode(options: Options, base_width: int, pictures: Path, target: Path) -> dict[str, float]:
    """Images/s of the whole command and of its encoder alone on ready tensors: same batch, threads and flips."""
    autoencoder = _encoder(base_width)
    config = PreprocessConfig(
        source_url=str(pictures), dest=str(target), size=SIDE, batch_size=BATCH, encode_threads=options.threads,
        samples_per_shard=4 * BATCH, device=options.device,
    ).with_crop()  # fmt: skip
    LatentEncoder(autoencoder, config)  # places the network and sets the threads
    num_batches = max(2, len(list(pictures.iterdir())) // BATCH // 2)
    before = _encoder_rate(autoencoder, options.device, num_batches)
    whole = preprocess(config, autoencoder=autoencoder).samples_per_second
    after = _encoder_rate(autoencoder, options.device, num_batches)
    return {"whole command": whole, "encoder alone": (before + after) / 2}


@torch.inference_mode()
def _encoder_rate(autoencoder: Autoencoder, device: str, num_batches: int) -> float:
    """Images/s of the bare network. An image counts once, though its mirror is encoded too."""
    image = torch.randn(BATCH, 3, SIDE, SIDE, device=device)

    def run() -> None:
        autoencoder.moments(image)
        autoencoder.moments(image.flip(-1))

    run()
    wait_for(device)
    start = time.perf_counter()
    for _ in range(num_batches):
        run()
    wait_for(device)
    return num_batches * BATCH / (time.perf_counter() - start)


@torch.inference_mode()
def _encode_plainly(device: str, base_width: int, pictures: Path, target: Path) -> float:
    """Images/s of a script that does one thing after another: open, crop, encode with and without mirroring, save."""
    autoencoder = _encoder(base_width).to(device)
    files = sorted(pictures.iterdir())
    target.mkdir()
    start = time.perf_counter()
    for first in range(0, len(files), BATCH):
        batch = files[first : first + BATCH]
        image = torch.stack([_read(file, SIDE) for file in batch]).to(device)
        both = [autoencoder.moments(each).half().cpu().numpy() for each in (image, image.flip(-1))]
        for file, latent, mirrored in zip(batch, *both):
            np.save(target / f"{file.stem}.npy", np.stack([latent, mirrored]))
    return len(files) / (time.perf_counter() - start)


def _load(folder: Path, num_samples: int) -> dict[str, float]:
    """Samples/s for cached latents of 4x32x32 (float16), and with 128-pixel PNG targets."""
    make_pictures(folder / "loader-pictures", 32, 160, 160)
    config = PreprocessConfig(
        source_url=str(folder / "loader-pictures"), dest=str(folder / "loader"), size=128, batch_size=64,
        crops_per_image=num_samples // 32, crop_fraction=(0.5, 1.0), encode_threads=1,
    )  # fmt: skip
    preprocess(config, autoencoder=ConstantEncoder(4, 3))
    rates = {}
    for name, pixels in (("load latents", False), ("load latents and pixels", True)):
        with ShardLoader(config.dest, batch_size=64, pixels=pixels, num_threads=1) as loader:
            stream = iter(loader)
            num_batches = max(1, loader.num_samples // 64) * (1 if pixels else 4)
            for _ in islice(stream, num_batches):  # the first pass checks every shard
                pass
            start = time.perf_counter()
            for _ in islice(stream, num_batches):
                pass
            rates[name] = num_batches * 64 / (time.perf_counter() - start)
    return rates


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
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(base_width=base_width), has_decoder=False).eval()


def _encoder_macs(base_width: int, side: int) -> float:
    with torch.device("meta"):
        encoder, image = _encoder(base_width), torch.empty(1, 3, side, side)
        return macs_of(lambda: encoder.moments(image))
