"""Held-out figures while a stage trains: the same after a kill and for any number of workers, and what they decide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from stage_inputs import Shop
from test_ddp import command as with_engine
from test_resume import command, start, wait_for, weights
from two_workers import outputs, start_workers

from pipeline.autoencoder import latent_of
from pipeline.bundle import load_bundle
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from preprocess.shards.loader import ShardLoader
from training.config import StageConfig, override
from training.context import Context
from training.held_out import CHUNK, HeldOut
from training.noise import Draws
from training.optim import prolonged
from training.presets import debug
from training.request import TrainRequest
from training.run import TrainResult, make_context
from training.stage_figures import denoiser_figures
from training.watch import higher_is_better
from training.world import World

Run = Callable[..., TrainResult]


def figures(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step → its held-out figures."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    found = {row["step"]: {k: v for k, v in row.items() if k.startswith(("val/", "quality/"))} for row in rows}
    return {step: values for step, values in found.items() if values}


def run_on(shop: Shop) -> dict[str, str]:
    return {"data": shop.data, "bundle": shop.bundle}


@pytest.mark.slow
def test_a_killed_run_has_the_same_held_out_figures_to_the_bit(
    run_stage: Run, watched_shop: Shop, tmp_path: Path
) -> None:
    settings = ["denoiser.steps=24", "denoiser.checkpoint_every=5", "denoiser.validate_every=3"]
    settings += ["denoiser.early_stop_patience=9"]
    run_stage("denoiser", *settings, run_dir=tmp_path / "whole", **run_on(watched_shop))
    killed = start(command(watched_shop, tmp_path / "killed", *settings))
    wait_for(killed, tmp_path / "killed/metrics.jsonl", '"step": 13,')
    killed.kill()
    killed.wait()
    again = run_stage("denoiser", *settings, run_dir=tmp_path / "killed", **run_on(watched_shop))
    assert 0 < again.resumed_from < 24
    whole = figures(tmp_path / "whole")
    assert figures(tmp_path / "killed") == whole and list(whole) == [3, 6, 9, 12, 15, 18, 21, 24]
    assert set(whole[24]) == {"val/loss", *(f"val/loss_level{level}" for level in range(1, 9))}
    assert len({values["val/loss"] for values in whole.values()}) == 8  # it is the model that changes
    best = min(whole, key=lambda step: whole[step]["val/loss"])
    for name in ("whole", "killed"):
        meta = load_bundle(str(tmp_path / name / "bundle-best")).meta
        assert meta["best"] == {"figure": "val/loss", "value": whole[best]["val/loss"], "step": best}
    assert len({weights(tmp_path / name) for name in ("whole", "killed")}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.more), "deepspeed"])
def test_two_workers_have_the_figures_of_one(watched_shop: Shop, tmp_path: Path, engine: str) -> None:
    """With a learning rate that changes nothing, the figures are equal to the bit: a sample is computed with the same
    others, and all are summed in the same order. DeepSpeed's averages are in pieces (ZeRO 2)."""
    settings = ["global_batch=8", "steps=4", "validate_every=2", "bundle_every=2", "lr=1e-30", "zero_stage=0"]
    outputs(start_workers(*with_engine(watched_shop, "denoiser", tmp_path / "one", *settings, engine="local"), num=1))
    settings[-1] = "zero_stage=2" if engine == "deepspeed" else "zero_stage=0"
    outputs(start_workers(*with_engine(watched_shop, "denoiser", tmp_path / "two", *settings, engine=engine)))
    assert figures(tmp_path / "two") == figures(tmp_path / "one") and list(figures(tmp_path / "one")) == [2, 4]


def context_of(shop: Shop, stage: str, *settings: str, world: World | None = None) -> Context:
    preset = override(debug(), list(settings))
    request = TrainRequest(stage=stage, preset=preset, data=shop.data, run_dir="/nowhere", bundle=shop.bundle)
    return make_context(request, world or World(0, 1, 0, torch.device("cpu")))


def held_out(shop: Shop, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and stored latents of the split `val`, read in one piece."""
    with ShardLoader(shop.data, split="val", batch_size=num, flip=False, shuffle=False) as loader:
        batch = next(iter(loader))
    assert batch.pixels is not None and batch.latents is not None
    return batch.pixels, batch.latents


def test_workers_share_the_held_out_samples(watched_shop: Shop) -> None:
    num = 11
    settings = ["denoiser.validate_every=1", f"denoiser.validate_samples={num}"]
    _, latents = held_out(watched_shop, num)
    for size in (1, 2, 3):
        seen: dict[int, torch.Tensor] = {}
        for rank in range(size):
            world = World(rank, size, rank, torch.device("cpu"))
            context = context_of(watched_shop, "denoiser", "denoiser.global_batch=6", *settings, world=world)
            for micro in HeldOut(context, denoiser_figures(context)):
                assert micro.latents is not None and micro.pixels is None and len(micro.index) <= CHUNK
                seen |= dict(zip(micro.index, micro.latents))
        assert list(seen) == list(range(num)) and torch.equal(torch.stack(list(seen.values())), latents)


def test_decoder_figures_are_those_of_the_finished_bundle(run_stage: Run, watched_shop: Shop, tmp_path: Path) -> None:
    """By scikit-image, from the bundle that the run ends with."""
    settings = ["decoder.steps=6", "decoder.validate_every=4", "decoder.validate_samples=11", "decoder.lr=0.01"]
    run_stage("decoder", *settings, run_dir=tmp_path / "run", **run_on(watched_shop))
    told = figures(tmp_path / "run")[6]
    bundle = load_bundle(str(tmp_path / "run/bundle"))
    pixels, stored = held_out(watched_shop, 11)
    assert bundle.decoder is not None
    made = bundle.decoder(latent_of(stored, bundle.config.autoencoder), (32, 32))
    ours = ((made.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(pixels.numpy(), ours)]
    assert told["val/psnr_x32"] == pytest.approx(np.mean(expected), abs=1e-4)
    names = {name.split("_")[0] + "_" + name.rsplit("_", 1)[1] for name in told if name != "val/l1"}
    assert names == {"val/psnr_x8", "val/psnr_x16", "val/psnr_x32", "val/lpips_x32"}


def test_denoiser_figures_are_those_of_the_finished_bundle_at_each_level(
    run_stage: Run, watched_shop: Shop, tmp_path: Path
) -> None:
    """One sample at a time, noise and time drawn by its number."""
    run_stage("denoiser", "denoiser.steps=3", "denoiser.validate_every=2", "denoiser.validate_samples=9",
              run_dir=tmp_path / "run", **run_on(watched_shop))  # fmt: skip
    told = figures(tmp_path / "run")[3]
    bundle = load_bundle(str(tmp_path / "run/bundle"))
    _, stored = held_out(watched_shop, 9)
    schedule = Schedule(bundle.config.schedule)
    means = []
    for level in range(1, 9):
        errors = []
        for i in range(9):
            z0 = latent_of(stored[i : i + 1], bundle.config.autoencoder) * bundle.config.scale_factor
            draws = Draws(range(i, i + 1), "cpu", 0, "held out", level)
            t = 125 * (level - 1) + draws.integers(125)
            assert 125 * (level - 1) <= int(t) < 125 * level
            eps = draws.normal(tuple(z0.shape[1:]))
            assert bundle.denoiser is not None
            errors.append(float((bundle.denoiser(schedule.add_noise(z0, eps, t), t) - eps).square().mean()))
        means.append(np.mean(errors))
        assert told[f"val/loss_level{level}"] == pytest.approx(means[-1], rel=1e-4)
    assert told["val/loss"] == pytest.approx(np.mean(means), rel=1e-4)


@pytest.mark.parametrize("stage", ["autoencoder", "joint", "align"])
def test_other_stages_validate_without_touching_what_is_trained(
    run_stage: Run, watched_shop: Shop, tmp_path: Path, stage: str
) -> None:
    name = "autoencoder" if stage == "joint" else stage
    settings = [f"{name}.steps=4", *(["autoencoder.decoder=implicit"] if stage == "joint" else [])]
    places = {"data": watched_shop.pixels if name == "autoencoder" else watched_shop.data}
    places |= {} if name == "autoencoder" else {"bundle": watched_shop.bundle}
    watching = [f"{name}.validate_every=2", f"{name}.bundle_every=1", f"{name}.power_ema_every=2"]
    run_stage(name, *settings, run_dir=tmp_path / "plain", **places)
    run_stage(name, *settings, *watching, run_dir=tmp_path / "watched", **places)
    rows = [
        json.loads((tmp_path / kind / "metrics.jsonl").read_text().splitlines()[-1]) for kind in ("plain", "watched")
    ]
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["grad_norm"] == rows[1]["grad_norm"]
    expected = {"val/loss", "val/loss_level8"} if stage == "align" else {"val/l1", "val/psnr_x8", "val/psnr_x32"}
    assert expected <= figures(tmp_path / "watched")[4].keys() and 0 < rows[1]["validate_percent"] < 100
    for part in ("autoencoder", "decoder", "denoiser"):
        files = [tmp_path / kind / f"bundle/{part}.safetensors" for kind in ("plain", "watched")]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()


def test_without_a_held_out_split_one_line_says_so(
    run_stage: Run, shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="latentzoom"):
        run_stage("denoiser", "denoiser.validate_every=2")
    lines = [record.getMessage() for record in caplog.records if "validation" in record.getMessage()]
    assert lines == [
        f"denoiser: no validation, since {shop.data} has no split 'val'; hold images out with --val-fraction 0.02"
    ]
    assert figures(tmp_path / "denoiser") == {}
    with pytest.raises(UserError, match=r"early_stop_patience = 3 needs held-out figures; .* has no split 'val'"):
        run_stage("denoiser", "denoiser.validate_every=2", "denoiser.early_stop_patience=3", run_dir=tmp_path / "other")


def test_a_stage_that_does_not_get_better_ends_early(
    run_stage: Run, watched_shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["decoder.steps=40", "decoder.validate_every=2", "decoder.early_stop_patience=3", "decoder.lr=1e-30"]
    settings += ["decoder.best_by=val/psnr_x16", "decoder.checkpoint_every=100"]
    with caplog.at_level("INFO", logger="latentzoom"):
        result = run_stage("decoder", *settings, run_dir=tmp_path / "run", **run_on(watched_shop))
    assert result.steps == 8 and load_bundle(result.bundle).meta["stages"]["decoder"]["steps"] == 8
    assert "ends early at step 8: val/psnr_x16 has not become better in 3 validations; the best was" in caplog.text
    assert run_stage("decoder", *settings, run_dir=tmp_path / "run", **run_on(watched_shop)) == result
    (tmp_path / "run/result.json").unlink()  # it continues from its checkpoint, and knows
    assert run_stage("decoder", *settings, run_dir=tmp_path / "run", **run_on(watched_shop)).steps == 8
    more = [*settings, "decoder.steps=50"]
    with caplog.at_level("INFO", logger="latentzoom"):
        assert run_stage("decoder", *more, run_dir=tmp_path / "run", **run_on(watched_shop)).steps == 8
    assert "decoder ended early at step 8 and does not go on: early_stop_patience = 3; raise it" in caplog.text
    longer = [*settings, "decoder.early_stop_patience=5"]
    assert run_stage("decoder", *longer, run_dir=tmp_path / "run", **run_on(watched_shop)).steps == 12


def test_a_figure_that_there_is_not_is_refused_before_training(run_stage: Run, watched_shop: Shop) -> None:
    with pytest.raises(
        UserError, match=r"best_by = 'val/psnr' is no figure of this stage; use one of val/l1, val/psnr_x8"
    ):
        run_stage("decoder", "decoder.validate_every=1", "decoder.best_by=val/psnr", **run_on(watched_shop))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stop_patience": 2}, "early_stop_patience = 2 .* validate_every above 0"),
        ({"best_by": "quality/kid_x256", "validate_every": 5}, "best_by = 'quality/kid_x256' .* quality_every above 0"),
        ({"best_by": "loss", "validate_every": 5}, "best_by = 'loss' is not allowed"),
        ({"validate_samples": 0}, "validate_samples = 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StageConfig(**settings)  # type: ignore[arg-type]


def test_directions_of_figures() -> None:
    better = ["val/psnr_x64", "quality/ssim_x4", "val/teacher_psnr_x32", "quality/psnr_x4"]
    assert all(map(higher_is_better, better))
    assert not any(map(higher_is_better, ["val/loss", "val/lpips_x64", "quality/kid_random_vgg_x64", "val/l1"]))


def test_a_checkpoint_from_before_is_continued(run_stage: Run, watched_shop: Shop, tmp_path: Path) -> None:
    before = ["denoiser.steps=4", "denoiser.validate_every=0"]
    run_stage("denoiser", *before, run_dir=tmp_path / "run", **run_on(watched_shop))
    manifest = tmp_path / "run/checkpoints/step-00000004/manifest.json"
    stored = json.loads(manifest.read_text())
    del stored["state"]["watch"], stored["state"]["steps"]
    for name in [key for key in stored["state"]["fingerprint"]["settings"] if key.startswith(("validate", "best"))]:
        del stored["state"]["fingerprint"]["settings"][name]
    manifest.write_text(json.dumps(stored))
    settings = ["denoiser.steps=6", "denoiser.validate_every=2"]
    again = run_stage("denoiser", *settings, run_dir=tmp_path / "run", **run_on(watched_shop))
    assert again.resumed_from == 4 and list(figures(tmp_path / "run")) == [6]


def test_raised_steps_say_what_becomes_of_a_cosine(
    run_stage: Run, watched_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    config = StageConfig(steps=100, lr=1.0, schedule="cosine")
    assert prolonged(config, 50, 50) == (
        "100 steps in place of 50; the learning rate goes on along the longer cosine: 0 at step 50, 0.484 at the next"
    )
    assert prolonged(config, 50, 100) == "" == prolonged(config, 100, 50)
    assert prolonged(StageConfig(steps=100), 50, 50) == "100 steps in place of 50"
    settings = ["denoiser.schedule=cosine", "denoiser.steps=2"]
    run_stage("denoiser", *settings, **run_on(watched_shop))
    with caplog.at_level("INFO", logger="latentzoom"):
        assert run_stage("denoiser", *settings, "denoiser.steps=4", **run_on(watched_shop)).steps == 4
    assert "4 steps in place of 2; the learning rate goes on along the longer cosine" in caplog.text
