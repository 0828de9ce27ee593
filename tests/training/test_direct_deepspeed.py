"""Direct and joint training and distillation under DeepSpeed (one process, gloo): as under the plain engine, and
exact after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from direct_settings import DIRECT, WITH_ENCODER, save_first_stage, with_conditions
from stage_inputs import Shop
from test_resume import losses, wait_for
from test_resume_deepspeed import finish

from pipeline import storage
from training.config import override
from training.presets import debug
from training.run import train

_STEPS = 30
DISTILL = ["model.task=sr", "model.lr_size=8", "one_step=true", "distill.teacher_steps=2", "distill.crop_cells=5"]
JOINT = ["model.task=sr", "model.lr_size=8", "autoencoder.decoder=implicit", "autoencoder.crop=14"]


def one_worker(stage: str, data: str, bundle: str, run_dir: str, *settings: str) -> None:
    """What the test starts: a process group of one, and the stage in it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    preset = override(debug(), list(settings))
    train(stage, preset, data=data, bundle=bundle or None, run_dir=run_dir, use_deepspeed=True, device="cpu")


def start(stage: str, data: str, bundle: str, run_dir: Path, settings: list[str]) -> subprocess.Popen[str]:
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, stage, data, bundle, str(run_dir), *settings]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **here}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "zero_stage", "precision"),
    [
        ("drawn", 3, "bf16"),
        pytest.param("cached", 1, "fp32", marks=pytest.mark.more),
        pytest.param("joint", 1, "fp32", marks=pytest.mark.more),
        ("joint", 3, "fp32"),
        ("distill", 1, "fp32"),
        pytest.param("distill", 3, "fp32", marks=pytest.mark.more),
    ],
)
def test_it_trains_as_the_plain_engine_does_and_a_killed_run_ends_like_an_uninterrupted_one(
    kind: str, zero_stage: int, precision: str, shop: Shop, sr_shop: Shop, tmp_path: Path
) -> None:
    stage, data, bundle = {"joint": "autoencoder", "distill": "distill"}.get(kind, "decoder"), shop.pixels, ""
    cached = [*WITH_ENCODER, "decoder.conditions=cached"]
    settings = {"drawn": DIRECT, "cached": cached, "joint": JOINT, "distill": DISTILL}[kind]
    if kind == "distill":
        data, bundle = sr_shop.data, sr_shop.bundle
    if kind == "cached":
        bundle = save_first_stage(str(tmp_path / "first"), override(debug(), settings).model)
        data = with_conditions(Path(shop.pixels).parent / "pictures", tmp_path / "data", bundle, 9, 16)
    names = [f"steps={_STEPS}", "checkpoint_every=5", "schedule=cosine", "micro_batch=2", f"zero_stage={zero_stage}"]
    settings = [*settings, *(f"{stage}.{name}" for name in [*names, f"precision={precision}"])]

    whole = finish(start(stage, data, bundle, tmp_path / "whole", settings), tmp_path / "whole")
    killed = start(stage, data, bundle, tmp_path / "killed", settings)
    wait_for(killed, tmp_path / "killed/metrics.jsonl", '"step": 18,')
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = finish(start(stage, data, bundle, tmp_path / "killed", settings), tmp_path / "killed")
    assert 10 <= again["resumed_from"] < _STEPS and whole["resumed_from"] == 0
    (newest, *_) = sorted((tmp_path / "killed/checkpoints").glob("step-*/manifest.json"), reverse=True)
    assert json.loads(newest.read_text())["engine"] == "deepspeed"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for part in {"joint": ("autoencoder", "decoder"), "distill": ("denoiser",)}.get(kind, ("decoder",)):
        digests = {storage.sha256_file(f"{result['bundle']}/{part}.safetensors") for result in (whole, again)}
        assert len(digests) == 1

    preset = override(debug(), settings)
    plain = train(stage, preset, data=data, run_dir=str(tmp_path / "plain"), bundle=bundle or None, device="cpu")
    assert plain.sample_order == again["sample_order"] == whole["sample_order"]
    tolerance = 2e-4 if precision == "fp32" else 3e-2
    assert list(losses(tmp_path / "plain").values()) == pytest.approx(
        list(losses(tmp_path / "whole").values()), rel=tolerance
    )


if __name__ == "__main__":
    one_worker(*sys.argv[1:])
