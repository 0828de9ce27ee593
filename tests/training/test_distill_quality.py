"""A small super-resolution model trained from nothing on photographs, and its one-step student: what the step costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestration.evaluation.evaluate import evaluate
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.config import override
from training.evaluation.spec import ONE_STEP, EvaluationSpec
from training.presets import demo
from training.run import train

LEARNS = {
    "autoencoder": ["steps=300", "lr=5e-4"],
    "decoder": ["steps=400", "lr=1e-3", "min_size=16", "crop=24"],
    "denoiser": ["steps=1200", "lr=2e-3"],
    "align": ["steps=40", "lr=1e-4", "min_size=16", "crop=24"],
    "distill": ["steps=300", "lr=7e-4", "min_size=16", "crop=24", "teacher_steps=4"],
}
COMMON = ["global_batch=16", "warmup_steps=20", "schedule=cosine", "beta2=0.99", "ema_decay=0.99", "grid_every=0"]
MODEL = ["task=sr", "image_size=32", "lr_size=8"]


@pytest.mark.slow
def test_one_step_costs_at_most_three_tenths_of_a_decibel(tmp_path: Path) -> None:
    """Against the teacher's twenty steps, on crops that neither has seen, from the same inputs and noise."""
    lay_out(tmp_path / "pictures")
    settings = [f"model.{setting}" for setting in MODEL] + ["one_step=true"]
    for stage, own in LEARNS.items():
        settings += [f"{stage}.{setting}" for setting in [*COMMON, *own, "checkpoint_every=200", "log_every=50"]]
    preset = override(demo(), settings)
    source = {"source_url": str(tmp_path / "pictures"), "size": 32, "val_folder": "val", "encode_threads": 1}
    data, bundle, bundles = str(tmp_path / "pixels"), None, {}
    preprocess(PreprocessConfig(dest=data, **source))
    for stage in preset.stages:
        bundle = train(stage, preset, data=data, run_dir=str(tmp_path / stage), bundle=bundle, device="cpu").bundle
        bundles[stage] = bundle
        if stage == "autoencoder":
            data = str(tmp_path / "latents")
            preprocess(PreprocessConfig(dest=data, autoencoder=bundle, lr_sizes=(8,), **source))
    options = {"num": 32, "chunk_size": 32, "batch_size": 32}
    spec = EvaluationSpec(task="sr", scales=(2.5, 4.0), teacher=bundles["align"], **options)
    report, _ = evaluate(bundles["distill"], data, spec, progress=False)
    assert report.sampler == ONE_STEP
    for scale in ("x2.5", "x4"):
        figures = {
            method: report.get("psnr_rgb", scale, method) for method in ("ours", "teacher", "nearest", "bicubic")
        }
        values = {method: figure.value for method, figure in figures.items() if figure is not None}
        print(scale, values)
        assert values["teacher"] > values["bicubic"] > values["nearest"]  # a teacher that has learnt something
        assert values["ours"] > values["teacher"] - 0.3


def lay_out(folder: Path) -> None:
    """Crops of four photographs; those of the left quarter are held out."""
    from skimage import data

    rng, side = np.random.default_rng(0), 96
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        photo = Image.fromarray(getattr(data, name)())
        border = photo.width // 4
        for number in range(100):
            is_held_out = number < 20
            left, right = (0, border - side) if is_held_out else (border, photo.width - side)
            x, y = (
                int(rng.integers(min(left, max(right, 0)), max(right, 0) + 1)),
                int(rng.integers(photo.height - side)),
            )
            target = folder / ("val" if is_held_out else "") / f"{name}-{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            crop = photo.crop((x, y, x + side, y + side))
            crop.resize((32, 32), Image.Resampling.BICUBIC).save(target)
