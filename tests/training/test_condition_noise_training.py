"""Denoiser and alignment stages with noise on their super-resolution conditions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from stage_inputs import Shop, make_shop

from pipeline.bundle import load_bundle, save_bundle
from pipeline.denoiser import Denoiser
from pipeline.errors import UserError
from training.config import Preset, override
from training.micro_batch import MicroBatch
from training.noise import Draws
from training.presets import debug
from training.run import train
from training.stages.denoiser import shown_condition

NOISY = ["model.task=sr", "model.lr_size=8", "model.denoiser.condition_noise=0.4"]


@pytest.fixture(scope="module")
def noisy_shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("noisy"), override(debug(), NOISY), num=8)


def run(shop: Shop, stage: str, run_dir: Path, *settings: str, bundle: str = "") -> str:
    preset: Preset = override(shop.preset, list(settings))
    options = {"data": shop.data, "bundle": bundle or shop.bundle, "run_dir": str(run_dir), "device": "cpu"}
    return train(stage, preset, **options).bundle  # type: ignore[arg-type]


def test_strengths_and_noise_belong_to_the_sample_and_the_step() -> None:
    model = override(debug(), NOISY).model
    condition = torch.randn(6, 3, 8, 8)

    def shown(first: int, last: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        micro = MicroBatch(range(first, last), None, None, condition[first:last])
        made, strength = shown_condition(micro, condition[first:last], model, 1, step)
        assert made is not None and strength is not None
        return made, strength

    whole, strengths = shown(0, 6, 3)
    parts = [shown(0, 2, 3), shown(2, 6, 3)]
    assert torch.equal(whole, torch.cat([p[0] for p in parts]))
    assert torch.equal(strengths, torch.cat([p[1] for p in parts]))
    assert not torch.equal(strengths, shown(0, 6, 4)[1])
    drawn = torch.cat([shown(0, 6, step)[1] for step in range(200)])
    assert 0 <= float(drawn.min()) < 0.01 and 0.39 < float(drawn.max()) < 0.4
    draws = Draws(range(1), "cpu", 1, "condition", 3)
    strength = 0.4 * draws.uniform()
    expected = (1 - strength**2).sqrt() * condition[0] + strength * draws.normal((3, 8, 8))[0]
    torch.testing.assert_close(whole[0], expected)
    assert shown_condition(MicroBatch(range(6), None, None, None), condition, debug().model, 1, 3) == (condition, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_stages_train_with_it_and_the_bundle_remembers(noisy_shop: Shop, tmp_path: Path, precision: str) -> None:
    settings = [f"{stage}.precision={precision}" for stage in ("denoiser", "align")]
    denoiser = run(noisy_shop, "denoiser", tmp_path / "denoiser", *settings)
    aligned = run(noisy_shop, "align", tmp_path / "align", *settings, bundle=denoiser)
    bundle = load_bundle(aligned)
    assert bundle.config.denoiser.condition_noise == 0.4 and bundle.denoiser is not None
    moved = bundle.denoiser.strength_embedding.linear_2.weight
    assert float(moved.abs().max()) > 0  # it began at zero


def test_a_bundle_without_it_is_not_aligned_with_it(noisy_shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="denoiser"):
        run(noisy_shop, "align", tmp_path / "align", "model.denoiser.condition_noise=0")


def test_a_denoiser_that_knows_no_noise_may_learn_it_but_none_forgets_it(
    noisy_shop: Shop, sr_shop: Shop, tmp_path: Path
) -> None:
    """Fine-tuning: the weights for its strength are new, and without effect until they are trained."""
    still = ["denoiser.lr=1e-12", "denoiser.ema_decay=0", "denoiser.steps=1", "denoiser.start=bundle"]
    url = run(noisy_shop, "denoiser", tmp_path / "learns", *still, bundle=_with_denoiser(noisy_shop, sr_shop, tmp_path))
    before, after = load_bundle(sr_shop.bundle).denoiser, load_bundle(url).denoiser
    assert before is not None and after is not None and after.config.condition_noise == 0.4
    z, t, condition = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        told = after(z, t, condition, torch.tensor([0.1, 0.4]))
        torch.testing.assert_close(told, before(z, t, condition), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=r"denoiser.condition_noise = 0.4 in the bundle and 0.0 in the preset"):
        run(noisy_shop, "denoiser", tmp_path / "forgets", *still, "model.denoiser.condition_noise=0")


def _with_denoiser(shop: Shop, other: Shop, folder: Path) -> str:
    """The bundle of `shop` with the other's denoiser, which knows no noise."""
    mine, theirs = load_bundle(shop.bundle), load_bundle(other.bundle)
    config = dataclasses.replace(mine.config, denoiser=theirs.config.denoiser)
    save_bundle(str(folder / "mixed"), dataclasses.replace(mine, config=config, denoiser=theirs.denoiser))
    return str(folder / "mixed")


def test_a_student_is_shown_the_noisy_condition_that_its_teacher_sees(
    noisy_shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    forward = Denoiser.forward

    def watching(self: Denoiser, z: torch.Tensor, t: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        seen.append((c, s))
        return forward(self, z, t, c, s)

    monkeypatch.setattr(Denoiser, "forward", watching)
    url = run(noisy_shop, "distill", tmp_path / "run", "distill.steps=1", "distill.teacher_steps=2")
    assert len(seen) == 3  # twice the teacher, once the student
    assert all(torch.equal(c, seen[0][0]) and torch.equal(s, seen[0][1]) for c, s in seen)
    assert 0 < float(seen[0][1].max()) < 0.4
    assert load_bundle(url).config.denoiser.condition_noise == 0.4
