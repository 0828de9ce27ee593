"""Distributed data parallel: two processes learn what one learns, whatever the engine, and continue each other."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_inputs import Shop
from test_resume import wait_for
from two_workers import outputs, start_workers

from pipeline.errors import UserError
from training.config import StageConfig
from training.engine import make_engine
from training.world import World

SETTINGS = ["global_batch=8", "schedule=cosine", "checkpoint_every=4", "zero_stage=0"]


def command(shop: Shop, stage: str, run_dir: Path, *settings: str, engine: str = "ddp") -> list[str]:
    words = ["-m", "training.cli", stage, "--preset", "debug", "--data", shop.data, "--run-dir", str(run_dir)]
    words += ["--bundle", shop.bundle, "--local", "--device", "cpu", "--engine", engine, "--threads", "1"]
    return words + [word for setting in settings for word in ("--set", f"{stage}.{setting}")]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def learnt(run_dir: Path, part: str = "denoiser") -> torch.Tensor:
    tensors = load_file(run_dir / f"bundle/{part}.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.slow
def test_two_processes_learn_what_one_and_what_deepspeed_learns(shop: Shop, tmp_path: Path) -> None:
    """The same samples, noise and averaged gradients, with two micro-batches a step: equal to float32 rounding."""
    settings = [*SETTINGS, "steps=6", "micro_batch=2", "log_every=1"]
    for name, num, engine in (("one", 1, "local"), ("two", 2, "ddp"), ("deepspeed", 2, "deepspeed")):
        outputs(start_workers(*command(shop, "denoiser", tmp_path / name, *settings, engine=engine), num=num))
    one = losses(tmp_path / "one")
    assert len(one) == 6 and one[-1] < one[0]
    for name in ("two", "deepspeed"):
        assert losses(tmp_path / name) == pytest.approx(one, rel=2e-5)
        assert float((learnt(tmp_path / name) - learnt(tmp_path / "one")).abs().max()) < 2e-5


@pytest.mark.slow
@pytest.mark.more
@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "align"])
def test_every_stage_trains(shop: Shop, tmp_path: Path, stage: str) -> None:
    settings = [*SETTINGS, "steps=3", "micro_batch=2", "log_every=1"]
    for name, num, engine in (("one", 1, "local"), ("two", 2, "ddp")):
        words = command(shop, stage, tmp_path / name, *settings, engine=engine)
        outputs(start_workers(*words, num=num))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one_and_may_go_on_alone(shop: Shop, tmp_path: Path) -> None:
    settings = [*SETTINGS, "steps=24", "log_every=1"]
    outputs(start_workers(*command(shop, "denoiser", tmp_path / "whole", *settings)))
    workers = start_workers(*command(shop, "denoiser", tmp_path / "killed", *settings))
    wait_for(workers[0], tmp_path / "killed/metrics.jsonl", '"step": 13,')
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
    outputs(start_workers(*command(shop, "denoiser", tmp_path / "killed", *settings)))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 24
    assert torch.equal(learnt(tmp_path / "killed"), learnt(tmp_path / "whole"))
    # Its checkpoints are those of one process.
    longer = [*SETTINGS, "steps=26", "log_every=1"]
    outputs(start_workers(*command(shop, "denoiser", tmp_path / "whole", *longer, engine="local"), num=1))
    assert len(losses(tmp_path / "whole")) == 26


def test_partitioned_state_needs_deepspeed() -> None:
    world = World(0, 2, 0, torch.device("cpu"))
    with pytest.raises(UserError, match="zero_stage = 2 splits .* needs the engine deepspeed"):
        make_engine(torch.nn.Linear(2, 2), StageConfig(zero_stage=2, global_batch=8), world, deepspeed=False)


def test_without_a_process_group_several_workers_are_refused() -> None:
    world = World(0, 2, 0, torch.device("cpu"))
    with pytest.raises(UserError, match="start them by Ray Train or torchrun"):
        make_engine(torch.nn.Linear(2, 2), StageConfig(global_batch=8), world, deepspeed=False)
