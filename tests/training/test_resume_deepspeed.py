"""A DeepSpeed run of one process that is killed ends as if nothing had happened: gloo, no Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_inputs import Shop
from test_resume import losses, wait_for, weights

from pipeline import storage
from training import engine_deepspeed
from training.config import StageConfig, override
from training.precision import cast
from training.presets import debug
from training.run import train
from training.world import World

_STEPS = 40
BF16_WEIGHTS = "--bf16-weights"


def train_bf16_weights() -> None:
    """As this project did at first: DeepSpeed's own bf16, whose weights are rounded and have float32 masters beside."""
    today = engine_deepspeed.deepspeed_config

    def at_first(config: StageConfig, world: World, accumulation: int, num_parameters: int) -> dict[str, Any]:
        return {
            **today(config, world, accumulation, num_parameters),
            "torch_autocast": {"enabled": False},
            "bf16": {"enabled": True},
        }

    def call(self: engine_deepspeed.DeepSpeedEngine, *inputs: Any) -> Any:
        return cast(self._engine(*(cast(value, torch.bfloat16) for value in inputs)), torch.float32)

    engine_deepspeed.deepspeed_config = at_first
    engine_deepspeed.DeepSpeedEngine.__call__ = call  # type: ignore[method-assign]


def one_worker(data: str, bundle: str, run_dir: str, *settings: str) -> None:
    """What the test starts: a process group of one, and the stage in it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if settings[:1] == (BF16_WEIGHTS,):
        train_bf16_weights()
    preset = override(debug(), [name for name in settings if name != BF16_WEIGHTS])
    train("denoiser", preset, data=data, bundle=bundle, run_dir=run_dir, use_deepspeed=True, device="cpu")


def start(shop: Shop, run_dir: Path, *settings: str) -> subprocess.Popen[str]:
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, shop.data, shop.bundle, str(run_dir), *settings]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **here}
    )


def finish(process: subprocess.Popen[str], run_dir: Path) -> dict[str, Any]:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return dict(storage.read_json(str(run_dir / "result.json")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero_stage, precision, kill_at",
    [
        pytest.param(1, "fp32", 13, marks=pytest.mark.more),
        pytest.param(1, "fp32", 31, marks=pytest.mark.more),
        (1, "bf16", 31),
        (3, "fp32", 31),
    ],
)
def test_killed_deepspeed_run_ends_like_an_uninterrupted_one(
    shop: Shop, tmp_path: Path, zero_stage: int, precision: str, kill_at: int
) -> None:
    names = [f"steps={_STEPS}", "checkpoint_every=5", "schedule=cosine", "micro_batch=2"]
    settings = [f"denoiser.{name}" for name in [*names, f"zero_stage={zero_stage}", f"precision={precision}"]]
    whole = finish(start(shop, tmp_path / "whole", *settings), tmp_path / "whole")
    killed = start(shop, tmp_path / "killed", *settings)
    wait_for(killed, tmp_path / "killed/metrics.jsonl", f'"step": {kill_at},')
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = finish(start(shop, tmp_path / "killed", *settings), tmp_path / "killed")
    # A checkpoint is begun once the one before it is complete, so no more than the newest can be missing.
    assert 5 * (kill_at // 5) - 5 <= again["resumed_from"] < _STEPS
    (newest, *_) = sorted((tmp_path / "killed/checkpoints").glob("step-*/manifest.json"), reverse=True)
    assert json.loads(newest.read_text())["engine"] == "deepspeed"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "killed")) == list(range(1, _STEPS + 1))
    assert again["sample_order"] == whole["sample_order"]
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert (again["first_loss"], again["last_loss"]) == (whole["first_loss"], whole["last_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [*(pytest.param(z, marks=pytest.mark.more) for z in (0, 1, 3)), 2])
def test_a_run_whose_weights_were_bf16_goes_on(shop: Shop, tmp_path: Path, zero_stage: int) -> None:
    """Its checkpoint's masters become the weights: the next losses are those of a run that was today's all along."""
    names = ["checkpoint_every=10", f"zero_stage={zero_stage}", "precision=bf16"]
    settings = [f"denoiser.{name}" for name in names]
    whole = finish(start(shop, tmp_path / "whole", *settings, "denoiser.steps=20"), tmp_path / "whole")
    finish(start(shop, tmp_path / "run", BF16_WEIGHTS, *settings, "denoiser.steps=10"), tmp_path / "run")
    again = finish(start(shop, tmp_path / "run", *settings, "denoiser.steps=20"), tmp_path / "run")
    assert (again["resumed_from"], again["steps"]) == (10, 20) and again["sample_order"] == whole["sample_order"]
    assert list(losses(tmp_path / "run").values()) == pytest.approx(list(losses(tmp_path / "whole").values()), rel=2e-2)


if __name__ == "__main__":
    one_worker(*sys.argv[1:])
