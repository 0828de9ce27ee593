"""Distillation to one step: what is learnt, from what, and that a student says what it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stage_inputs import Shop

from pipeline import storage
from pipeline.autoencoder import latent_of
from pipeline.bundle import load_bundle, save_bundle
from pipeline.card import model_card
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from preprocess.loader import ShardLoader
from training.config import Preset, override
from training.estimate import dry_run, estimate
from training.noise import Draws
from training.run import TrainResult, train
from training.targets import draw_target


def run(shop: Shop, run_dir: Path, *settings: str, **options: Any) -> TrainResult:
    preset = override(shop.preset, ["one_step=true", "distill.teacher_steps=3", *settings])
    options = {"bundle": shop.bundle, **options}
    return train("distill", preset, data=shop.data, run_dir=str(run_dir), device="cpu", **options)


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}


def test_the_first_loss_is_that_of_the_teachers_trajectories(sr_shop: Shop, tmp_path: Path) -> None:
    """By hand: the noise of every sample, the latent that the product's own sampler makes of it, and a student that
    begins by predicting zero, since its teacher predicts eps."""
    result = run(sr_shop, tmp_path / "run", "distill.steps=1", "distill.lambda_truth=0.5", "distill.crop=20")
    teacher = LatentZoom.load(sr_shop.bundle)
    assert teacher.config.schedule.prediction == "eps"
    target = draw_target(override(sr_shop.preset, ["distill.crop=20"]).distill, teacher.config, 1)
    with ShardLoader(sr_shop.data, batch_size=4, lr_size=8) as loader, torch.no_grad():
        batch = next(iter(loader))
        assert batch.pixels is not None and batch.condition is not None
        noise = Draws(range(4), "cpu", 0, "trajectory", 1).normal((3, 8, 8))
        condition = latent_of(batch.condition.float(), teacher.config.autoencoder) * teacher.config.scale_factor
        latent = teacher.sample_latents(noise=noise, condition=condition, sampler="dpm++", num_steps=3)
        y0, x0, y1, x1 = target.window
        taught = teacher.decode(latent, target.size)[:, :, y0:y1, x0:x1]
        mean = teacher.decode(torch.zeros_like(latent), target.size)[:, :, y0:y1, x0:x1]
        truth = target.truth(batch.pixels / 127.5 - 1)
        z = latent * teacher.config.scale_factor
        expected = z.square().mean() + (mean - taught).square().mean() + 0.5 * (mean - truth).square().mean()
    assert result.last_loss == pytest.approx(float(expected), rel=1e-3)
    psnr = float((10 * torch.log10(4 / (taught.clamp(-1, 1) - truth).square().flatten(1).mean(1))).mean())
    assert result.metrics["teacher_psnr"] == pytest.approx(psnr, rel=1e-3)


def with_prediction(shop: Shop, kind: str, folder: Path) -> tuple[str, list[str]]:
    """A teacher of this prediction, whose latents are about as large as a trained one's: its last layer is small."""
    parts = load_bundle(shop.bundle)
    assert parts.denoiser is not None
    parts.denoiser.unet.conv_out.weight.mul_(0.1)
    schedule = dataclasses.replace(parts.config.schedule, prediction=kind)
    save_bundle(str(folder), dataclasses.replace(parts, config=dataclasses.replace(parts.config, schedule=schedule)))
    return str(folder), [f"model.schedule.prediction={kind}"]


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_student_learns_draws_and_says_that_it_takes_one_step(sr_shop: Shop, tmp_path: Path, prediction: str) -> None:
    bundle, settings = with_prediction(sr_shop, prediction, tmp_path / "teacher")
    options = ["steps=16", "lr=5e-3", "grid_every=16", "log_every=4", "loss=l1", "teacher_steps=4"]
    result = run(sr_shop, tmp_path / "run", *settings, *(f"distill.{option}" for option in options), bundle=bundle)
    assert result.last_loss < 0.9 * result.first_loss
    teacher, made = load_bundle(bundle), load_bundle(result.bundle)
    assert (made.config.schedule.distilled_steps, made.config.schedule.prediction) == (1, prediction)
    for part in ("autoencoder", "decoder"):
        files = (f"{url}/{part}.safetensors" for url in (bundle, result.bundle))
        assert len({storage.sha256_file(file) for file in files}) == 1
    assert made.meta["stages"]["distill"]["started_from"]["denoiser"]["part"] == "denoiser"
    assert "one-step denoiser, distilled" in model_card(made.config, made.meta)
    grid = np.asarray(Image.open(tmp_path / "run/grids/samples-00000016.png"))
    assert grid.shape == (5 * 34, 4 * 34, 3)  # low-res | bicubic | teacher | ours | truth, four samples each

    calls: list[int] = []
    model = LatentZoom(made)
    model._run_denoiser = lambda z, t, c: calls.append(int(t[0])) or made.denoiser(z, t, c)  # type: ignore[func-returns-value,misc]
    picture = Image.new("RGB", (9, 7), (90, 120, 30))
    own = model.upscale(picture, 2.3)
    assert calls == [999] and own.size == (21, 16)
    assert np.array_equal(own, model.upscale(picture, 2.3, num_steps=1, sampler="ddim"))
    with pytest.raises(UserError, match="this model was distilled to 1 step; give 1, or leave it out"):
        model.upscale(picture, 2.3, num_steps=20)
    assert teacher.config.schedule.distilled_steps == 0


def test_a_student_of_an_eps_teacher_predicts_the_latent(sr_shop: Shop, tmp_path: Path) -> None:
    made = load_bundle(run(sr_shop, tmp_path / "run", "distill.steps=1").bundle)
    assert load_bundle(sr_shop.bundle).config.schedule.prediction == "eps"
    assert made.config.schedule.prediction == "x0"


def test_a_run_that_fails_between_checkpoints_ends_like_an_uninterrupted_one(
    sr_shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grids are drawn meanwhile: they leave teacher and decoder as training has them."""
    import training.stages.distill as loop

    names = ["steps=6", "checkpoint_every=2", "schedule=cosine", "crop_cells=4", "context_cells=1", "grid_every=3"]
    settings = [f"distill.{name}" for name in names]
    whole = run(sr_shop, tmp_path / "whole", *settings)
    steps, original = [], loop.draw_target

    def failing(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "draw_target", failing)
    with pytest.raises(KeyboardInterrupt):
        run(sr_shop, tmp_path / "cut", *settings)
    again = run(sr_shop, tmp_path / "cut", *settings)
    assert again.resumed_from == 4 and again.sample_order == whole.sample_order
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert storage.sha256_file(f"{again.bundle}/denoiser.safetensors") == storage.sha256_file(
        f"{whole.bundle}/denoiser.safetensors"
    )


def test_accumulated_gradients_give_the_same_training(sr_shop: Shop, tmp_path: Path) -> None:
    for micro in (0, 1):
        run(sr_shop, tmp_path / str(micro), f"distill.micro_batch={micro}")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "0"), rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("distill", ["distill.lambda_latent=0", "distill.lambda_image=0"], "a positive one among them"),
        ("distill", ["distill.teacher_steps=0"], "teacher_steps = 0"),
        ("distill", ["distill.start=/some/bundle"], "a student begins as its teacher|is not one of"),
        ("distill", ["distill.min_size=40"], r"target sizes 40\.\.32 are empty"),
        ("distill", ["model.schedule.beta_end=0.02"], "schedule"),
    ],
)
def test_errors_before_training(sr_shop: Shop, tmp_path: Path, stage: str, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(sr_shop, tmp_path / "run", *settings)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_only_super_resolution_is_distilled_and_a_student_teaches_nobody(
    shop: Shop, sr_shop: Shop, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"run_dir": str(tmp_path / "run"), "device": "cpu"}
    with pytest.raises(UserError, match="task 'sr'.* this model's task is 'generation'"):
        train("distill", shop.preset, data=shop.data, bundle=shop.bundle, **common)
    with pytest.raises(UserError, match="one_step = True is not allowed"):
        override(shop.preset, ["one_step=true"])
    student = run(sr_shop, tmp_path / "student", "distill.steps=1").bundle
    for stage in ("align", "distill"):
        with pytest.raises(UserError, match=f"stage {stage}: the denoiser of the bundle is a one-step student already"):
            train(stage, sr_shop.preset, data=sr_shop.data, bundle=student, **common)


def test_a_preset_is_distilled_where_it_says_so(sr_shop: Shop) -> None:
    assert sr_shop.preset.stages == ("autoencoder", "decoder", "denoiser", "align")
    one_step: Preset = override(sr_shop.preset, ["one_step=true"])
    assert one_step.stages == ("autoencoder", "decoder", "denoiser", "align", "distill")


def test_the_estimate_counts_the_teachers_evaluations(sr_shop: Shop) -> None:
    model, config = sr_shop.preset.model, sr_shop.preset.distill
    denoiser = estimate("denoiser", sr_shop.preset.denoiser, model, 1)
    few, many = (
        estimate("distill", override(config, [f"teacher_steps={n}", "global_batch=4"]), model, 1) for n in (10, 30)
    )
    forward = denoiser.flops_per_step / 3
    assert many.flops_per_step - few.flops_per_step == pytest.approx(20 * forward, rel=1e-6)
    assert few.parameters == denoiser.parameters and few.frozen_parameters > few.parameters
    assert "stage distill" in dry_run("distill", sr_shop.preset, 1, "cpu").replace("                ", " ")
