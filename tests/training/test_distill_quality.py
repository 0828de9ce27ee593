"""A super-resolution model trained from nothing at the tests' size, and its one-step student: what the step costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestration.evaluation.evaluate import evaluate
from orchestration.evaluation.spec import ONE_STEP, EvaluationSpec
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.config import override
from training.presets import debug
from training.run import train

LEARNS = {
    "autoencoder": ["steps=200", "lr=2e-3", "start=linear"],
    "decoder": ["steps=200", "lr=2e-3", "start=linear", "min_size=16"],
    "denoiser": ["steps=1200", "lr=3e-3"],
    "align": ["steps=20", "lr=1e-4"],
    "distill": ["steps=500", "lr=3e-3", "teacher_steps=8"],
}
COMMON = ["global_batch=8", "warmup_steps=20", "schedule=cosine", "ema_decay=0.99", "log_every=50"]
MODEL = ["task=sr", "lr_size=8", "autoencoder.norm_groups=1", "decoder.norm_groups=1"]


@pytest.mark.slow
def test_one_step_costs_at_most_three_tenths_of_a_decibel(tmp_path: Path) -> None:
    """Against the teacher's twenty steps, on pictures that neither has seen, from the same inputs and noise."""
    for number in range(160):
        coarse = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        folder = tmp_path / "pictures" / ("val" if number < 32 else "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    settings = [f"model.{setting}" for setting in MODEL] + ["one_step=true"]
    for stage, own in LEARNS.items():
        settings += [f"{stage}.{setting}" for setting in [*COMMON, *own]]
        settings.append(f"{stage}.checkpoint_every=1000")
    preset = override(debug(), settings)
    assert preset.model.schedule.prediction == "eps"  # the harder case: its student must learn another prediction
    source = {"source_url": str(tmp_path / "pictures"), "size": 32, "val_folder": "val", "encode_threads": 1}
    data, bundles = str(tmp_path / "pixels"), {"": ""}
    preprocess(PreprocessConfig(dest=data, **source))
    last = ""
    for stage in preset.stages:
        result = train(
            stage, preset, data=data, run_dir=str(tmp_path / stage), bundle=bundles[last] or None, device="cpu"
        )
        bundles[stage], last = result.bundle, stage
        if stage == "autoencoder":
            data = str(tmp_path / "latents")
            preprocess(PreprocessConfig(dest=data, autoencoder=result.bundle, lr_sizes=(8,), **source))
    spec = EvaluationSpec(task="sr", scales=(2.5, 4.0), num=32, teacher=bundles["align"], chunk_size=32, batch_size=32)
    report, _ = evaluate(bundles["distill"], data, spec, progress=False)
    assert report.sampler == ONE_STEP
    for scale in ("x2.5", "x4"):
        values = {}
        for method in ("ours", "teacher", "bicubic", "nearest"):
            figure = report.get("psnr_rgb", scale, method)
            assert figure is not None
            values[method] = figure.value
        print(scale, values)
        assert values["ours"] > values["teacher"] - 0.3
        assert values["teacher"] > values["nearest"]  # a teacher that has learnt something
