"""What preprocessing leaks: how a process grows while it encodes many samples."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from orchestration.bench.inputs import ConstantEncoder, make_pictures
from orchestration.bench.measure import apart
from orchestration.bench.table import Options, Row
from preprocess.build import Built, ShardBuilder
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess


def bench_memory(options: Options, peak: float) -> list[Row]:
    """The whole command but for its encoder, in a process of its own: its rate and what it takes, and by how much it
    grows, whatever the device: the encoder is none."""
    del peak  # no operations are counted
    num_samples = 5_000 if options.quick else 20_000
    figures = apart(grow, num_samples)
    growth = figures["growth_mb"]
    return [
        Row(
            part="memory",
            name="command without encoder",
            rate=figures["rate"],
            unit="samples/s",
            memory_mb=figures["memory_mb"],
        ),
        Row(
            part="memory",
            name="growth in 10 000 samples",
            memory_mb=growth,
            note=f"{growth:+.2f} MB, fitted to the shards after the first quarter of {num_samples} samples",
        ),
    ]


def grow(num_samples: int) -> dict[str, float]:
    """Growth of this process after the first quarter of the samples, in MB by 10 000 of them ("growth_mb"), its memory
    at the end beyond what stood before ("memory_mb"), and samples/s ("rate")."""
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

    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        make_pictures(Path(folder, "small"), num_samples // 100, 96, 96)
        config = PreprocessConfig(
            source_url=f"{folder}/small", dest=f"{folder}/memory", size=32, crops_per_image=100,
            crop_fraction=(0.5, 1.0), batch_size=16, encode_threads=1, samples_per_shard=500,
        )  # fmt: skip
        stood = process.memory_info().rss
        ShardBuilder.build = watched  # type: ignore[method-assign]
        try:
            summary = preprocess(config, autoencoder=ConstantEncoder(4, 3))
        finally:
            ShardBuilder.build = original  # type: ignore[method-assign]
    late = [point for point in points if point[0] >= num_samples // 4]
    slope = np.polyfit([num for num, _ in late], [rss for _, rss in late], 1)[0]
    return {
        "growth_mb": float(slope) * 10_000 / 1e6,
        "memory_mb": (points[-1][1] - stood) / 1e6,
        "rate": summary.samples_per_second,
    }
