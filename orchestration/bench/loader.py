"""How long alignment stage 2 waits for data when it trains from shards, as users run it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

from orchestration.bench.align import narrow_preset
from orchestration.bench.inputs import make_shards
from orchestration.bench.table import Options, Row
from training.run import train

BATCH = 2
"""Images a training step."""


def bench_loader(options: Options, peak: float) -> list[Row]:
    """One row. Its ratio is to the same training with all data there: 1 where it never waits."""
    del peak  # no operations are counted
    preset = narrow_preset(options.width, BATCH)
    steps = 6 * (1 if options.quick else options.rounds)
    config = dataclasses.replace(preset.align, steps=steps, log_every=1, grid_every=0, checkpoint_every=10**6)
    config = dataclasses.replace(config, validate_every=0, bundle_every=0)
    preset = dataclasses.replace(preset, align=config)
    with tempfile.TemporaryDirectory(prefix="latentzoom-bench-") as folder:
        data, bundle = make_shards(Path(folder), preset.model)
        train("align", preset, data=data, run_dir=f"{folder}/run", bundle=bundle, device=options.device)
        reports = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    wait, rate = (
        float(np.mean([report[name] for report in reports[1:]])) for name in ("data_wait_percent", "images_per_s")
    )
    return [
        Row(
            part="loader",
            name="stage 2 from shards",
            rate=rate,
            unit="images/s",
            ratio=1 - wait / 100,
            note=f"waits {wait:.2f} % of the time for data",
        )
    ]
