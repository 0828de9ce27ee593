"""Every preset at a fraction of its width, by overrides: each of its stages takes one step, data and bundles going from
one to the next, and the model at the end makes a picture. In this process, and under DeepSpeed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.bundle import load_bundle
from pipeline.model import LatentZoom
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.config import STAGES, Preset, override
from training.presets import PRESETS, get_preset
from training.run import TrainResult, student_model, train

MORE = [pytest.mark.slow, pytest.mark.more]
QUICK = ("demo", "starter", "starter-sharp", "debug", "ffhq-256", "celebahq-sr-16-128", "df2k-sr")
"""Of the presets, those whose plain steps are among the quick tests."""
CI = ("starter-sharp", "celebahq-sr-16-128", "df2k-sr")
"""Those whose steps under DeepSpeed are among the slow tests that CI runs: one of each kind of model."""


def narrow(preset: Preset, *, precision: str = "") -> Preset:
    """The preset's sizes, levels, blocks, attention and losses; widths of 8 and one step of one sample. Models for
    super-resolution are distilled in the end."""
    settings = ["model.decoder.mlp_width=16", "model.decoder.light_width=16", "model.denoiser.head_channels=8"]
    for part in ("autoencoder", "decoder", "denoiser"):
        settings += [f"model.{part}.base_width=8", f"model.{part}.norm_groups=1"]
    for stage in STAGES:
        settings += [f"{stage}.steps=1", f"{stage}.global_batch=1", f"{stage}.grid_every=0"]
        settings += [f"{stage}.precision={precision}"] if precision else []
    if preset.decoder.perceptual_weight:
        settings += ["decoder.lpips_weights=random"]
    if preset.model.task == "sr":
        settings += ["one_step=true", "distill.teacher_steps=2"]
    return override(preset, settings)


def chain(name: str, root: Path, *, deepspeed: bool) -> list[TrainResult]:
    """All stages of the narrow preset, with the data that each needs; under DeepSpeed in the preset's own precision, in
    which processors without it are slow."""
    preset, results = narrow(get_preset(name), precision="" if deepspeed else "fp32"), []
    data: dict[str, str] = {}
    bundle: str | None = None
    if preset.decoder.start == "bundle":  # a preset that goes on from another one's model
        bundle = chain("starter", root / "before", deepspeed=deepspeed)[-1].bundle
    for stage in preset.stages:
        kind = "latents" if stage != "autoencoder" and preset.uses_latents else "pixels"
        if kind not in data:
            data[kind] = shards(root, preset, kind, bundle)
        where = {"data": data[kind], "run_dir": str(root / stage), "bundle": bundle, "device": "cpu"}
        results.append(train(stage, preset, use_deepspeed=deepspeed, **where))  # type: ignore[arg-type]
        bundle = results[-1].bundle
    return results


def shards(root: Path, preset: Preset, kind: str, bundle: str | None) -> str:
    model, dest = preset.model, root / kind
    source = root / "pictures"
    if not source.exists():
        source.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i in range(2):
            small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            small.resize((model.image_size,) * 2, Image.Resampling.BICUBIC).save(source / f"{i}.png")
    encoded = {"autoencoder": bundle, "lr_sizes": (model.lr_size,) if model.lr_size else (), "encode_threads": 1}
    preprocess(
        PreprocessConfig(
            source_url=str(source),
            dest=str(dest),
            size=model.image_size,
            condition_resize=model.condition_resize,
            **(encoded if kind == "latents" else {}),
        )
    )
    return str(dest)


def check(name: str, root: Path) -> None:
    """What the chain left behind is the preset's model, whole."""
    preset = narrow(get_preset(name))
    bundle = load_bundle(str(root / preset.stages[-1] / "bundle"))
    is_joint = "decoder" not in preset.stages
    assert bundle.decoder is not None and (bundle.denoiser is None) == (preset.model.task == "direct")
    assert bundle.autoencoder.has_decoder is not is_joint
    assert override(bundle.config, [f"scale_factor={preset.model.scale_factor}"]) == (
        student_model(preset.model) if preset.one_step else preset.model
    )
    model = LatentZoom(bundle)
    if preset.model.task == "generation":
        (picture,) = model.generate(num=1, size=(40, 56), num_steps=1)
    else:
        steps = {"num_steps": 1} if preset.model.task == "sr" else {}
        picture = model.upscale(Image.new("RGB", (12, 10), (90, 120, 30)), size=(40, 56), **steps)
    assert picture.size == (56, 40)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else MORE) for n in PRESETS])
def test_every_stage_steps_once_at_reduced_width(name: str, tmp_path: Path) -> None:
    results = chain(name, tmp_path, deepspeed=False)
    assert [result.stage for result in results] == list(narrow(get_preset(name)).stages)
    assert all(result.steps == 1 and math.isfinite(result.last_loss) for result in results)
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in CI else pytest.mark.more) for n in PRESETS])
def test_every_stage_steps_once_under_deepspeed(name: str, tmp_path: Path) -> None:
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, name, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **here})
    assert done.returncode == 0, done.stdout + done.stderr
    check(name, tmp_path)


def main(name: str, root: str) -> None:
    """What the test starts: a process group of one, and the chain in it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    results = chain(name, Path(root), deepspeed=True)
    assert all(result.steps == 1 and math.isfinite(result.last_loss) for result in results)


if __name__ == "__main__":
    main(*sys.argv[1:])
