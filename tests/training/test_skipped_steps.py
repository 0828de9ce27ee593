"""A gradient that is not finite: the step changes nothing, is counted with its samples, and ends a run only beyond the
budget; on every worker alike, under every engine, and the same after a restart."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_inputs import Shop
from test_resume import weights
from torch import Tensor, nn
from two_workers import outputs, start_workers

from pipeline.errors import UserError
from training.adversary import Adversary
from training.config import AutoencoderStage, StageConfig
from training.engine import make_engine
from training.run import TrainResult
from training.session import Session
from training.world import World

Run = Callable[..., TrainResult]
ONE = World(0, 1, 0, torch.device("cpu"))


def spoil(steps: set[int]) -> Callable[[Session, Tensor, dict[str, Tensor]], None]:
    """`Session.backward` that makes the loss of the last worker's share of these steps NaN."""
    original = Session.backward

    def backward(self: Session, loss: Tensor, terms: dict[str, Tensor]) -> None:
        is_bad = self.step in steps and self.world.rank == self.world.size - 1
        original(self, loss * float("nan") if is_bad else loss, terms)

    return backward


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_no_trace(precision: str, value: float) -> None:
    """Weights and moments go on, to the bit, as if the step had not been."""
    inputs = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))

    def train(bad: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        config = StageConfig(global_batch=4, precision=precision, lr=0.1, weight_decay=0.1, ema_decay=0.0)  # type: ignore[arg-type]
        engine = make_engine(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)), config, ONE, deepspeed=False)
        for number, batch in enumerate(inputs):
            if number == bad:
                engine.backward(engine(batch).square().mean() * value)
                assert not torch.as_tensor(engine.step(number + 1, 0.1)).isfinite()
            elif number != 2:
                engine.backward(engine(batch).square().mean())
                assert torch.as_tensor(engine.step(number + 1, 0.1)).isfinite()
        state = engine.optimizer.state_dict()["state"]  # type: ignore[attr-defined]
        moments = [value for entry in state.values() for value in entry.values()]
        return [*engine.module.state_dict().values(), *moments]

    for spoilt, clean in zip(train(bad=2), train(bad=None), strict=True):
        assert torch.equal(spoilt, clean)


def test_the_discriminator_skips_too_and_reads_older_checkpoints() -> None:
    config = AutoencoderStage(adversarial_weight=1.0)
    adversary = Adversary(config, ONE)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adversary.backward(image, image.flip(0).square(), 1)
    adversary.step()
    before = [tensor.clone() for tensor in adversary.network.state_dict().values()]
    adversary.backward(image, image * float("nan"), 1)
    adversary.step()
    assert all(torch.equal(a, b) for a, b in zip(before, adversary.network.state_dict().values()))

    older = adversary.state_dict()
    for group in older["optimizer"]["param_groups"]:
        group["fused"] = None
    again = Adversary(config, ONE)
    again.load_state_dict(older)
    for one in (adversary, again):
        one.backward(image, image.square(), 1)
        one.step()
    pairs = zip(adversary.network.state_dict().values(), again.network.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_goes_on_and_says_which_samples(
    run_stage: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(Session, "backward", spoil({3, 5, 6}))
    caplog.set_level(logging.WARNING, "latentzoom")
    settings = [f"denoiser.{s}" for s in ("steps=8", "log_every=2", "max_skipped_steps=3", "checkpoint_every=4")]
    result = run_stage("denoiser", *settings)
    rows = {row["step"]: row for row in map(json.loads, (tmp_path / "denoiser/metrics.jsonl").read_text().splitlines())}
    assert {step: row.get("skipped_steps") for step, row in rows.items()} == {2: None, 4: 1.0, 6: 3.0, 8: 3.0}
    assert "loss" not in rows[6] and all("loss" in rows[step] for step in (2, 4, 8))  # neither step of it counts
    said = [record.message for record in caplog.records if "is skipped" in record.message]
    assert ["step 3 is skipped" in said[0], "step 5" in said[1], "step 6" in said[2]] == [True] * 3
    assert "(3 of at most 3 such steps); samples: 0" in said[2] and len(said[2].split("samples: ")[1].split(", ")) == 4
    assert result.metrics["skipped_steps"] == 3.0 and result.last_loss == rows[8]["loss"]


def test_a_mean_is_over_the_steps_that_count(run_stage: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Session, "backward", spoil({2}))
    settings = [
        f"denoiser.{s}" for s in ("steps=3", "checkpoint_every=3", "lr=1e-12", "validate_every=0", "bundle_every=0")
    ]
    run_stage("denoiser", *settings, "denoiser.log_every=1", run_dir=tmp_path / "each")
    run_stage("denoiser", *settings, "denoiser.log_every=3", run_dir=tmp_path / "all")
    each = [json.loads(line) for line in (tmp_path / "each/metrics.jsonl").read_text().splitlines()]
    (together,) = map(json.loads, (tmp_path / "all/metrics.jsonl").read_text().splitlines())
    assert together["loss"] == pytest.approx((each[0]["loss"] + each[2]["loss"]) / 2, rel=1e-12)


def test_beyond_the_budget_a_run_ends_again_and_again_until_more_is_allowed(
    run_stage: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Session, "backward", spoil({3, 6}))
    settings = [f"denoiser.{s}" for s in ("steps=8", "log_every=1", "checkpoint_every=2")]
    message = (
        r"at step 6; samples: 0.*; 2 such steps are more than denoiser.max_skipped_steps = 1; checkpoint of step 4"
    )
    for _ in range(2):  # the count is in the checkpoint of step 4, and step 6 is met again
        with pytest.raises(UserError, match=message):
            run_stage("denoiser", *settings, "denoiser.max_skipped_steps=1")
    allowed = run_stage("denoiser", *settings, "denoiser.max_skipped_steps=2")
    assert allowed.resumed_from == 4 and allowed.metrics["skipped_steps"] == 2.0
    whole = run_stage("denoiser", *settings, run_dir=tmp_path / "whole")
    assert weights(tmp_path / "denoiser") == weights(tmp_path / "whole")
    assert allowed.sample_order == whole.sample_order
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row.get("loss") for row in rows if "loss" in row}.keys() == {1, 2, 4, 5, 7, 8}


def test_a_loss_that_is_not_finite_though_its_gradient_is_ends_the_run(
    run_stage: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a step was applied, and nobody knows what the loss says."""
    original = Session.backward

    def backward(self: Session, loss: Tensor, terms: dict[str, Tensor]) -> None:
        original(self, loss + float("nan") if self.step == 2 else loss, terms)

    monkeypatch.setattr(Session, "backward", backward)
    with pytest.raises(
        UserError, match=r"not finite at step 2; samples: 0[^;]*; no checkpoint.*look at these samples$"
    ):
        run_stage("denoiser", "denoiser.steps=4", "denoiser.log_every=1", "denoiser.checkpoint_every=4")


def worker(steps: str, *words: str) -> None:
    """What the workers of the next test run: the command, with spoilt steps."""
    from training.cli import main

    Session.backward = spoil({int(step) for step in steps.split(",")})  # type: ignore[method-assign]
    raise SystemExit(main(list(words)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "which",
    ["ddp", *(pytest.param(f"deepspeed {i}", marks=pytest.mark.more) for i in (0, 1, 3)), "deepspeed 2"],
)
def test_two_workers_agree_under_every_engine(shop: Shop, tmp_path: Path, which: str) -> None:
    """Only the second worker's share is bad. The run ends beyond the budget on both, goes on from the checkpoint where
    more is allowed, and learns what it learns in one piece."""
    engine, _, zero = which.partition(" ")
    words = ["denoiser", "--preset", "debug", "--data", shop.data, "--bundle", shop.bundle, "--local"]
    words += ["--device", "cpu", "--engine", engine, "--threads", "1"]
    for setting in (
        "steps=7",
        "global_batch=8",
        "micro_batch=2",
        f"zero_stage={zero or 0}",
        "checkpoint_every=2",
        "log_every=1",
    ):
        words += ["--set", f"denoiser.{setting}"]

    def run(name: str, allowed: int) -> list[str]:
        more = ["--run-dir", str(tmp_path / name), "--set", f"denoiser.max_skipped_steps={allowed}"]
        workers = start_workers(__file__, "3,5", *words, *more)
        return outputs(workers) if allowed > 1 else [worker.communicate(timeout=900)[0] for worker in workers]

    for text in run("cut", 1):
        assert (
            "not finite at step 5" in text and "2 such steps are more than" in text and "checkpoint of step 4" in text
        )
    first, _ = run("cut", 2)
    assert "continuing denoiser after step 4" in first and "step 5 is skipped" in first
    assert len(first.split("samples: ")[1].splitlines()[0].split(", ")) == 4  # those of the bad share
    run("whole", 2)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole") and len(losses_of(tmp_path / "whole")) == 5
    cut, whole = (load_file(tmp_path / name / "bundle/denoiser.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], whole[name]) and whole[name].isfinite().all() for name in whole)


def losses_of(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


if __name__ == "__main__":
    worker(*sys.argv[1:])
