"""The four loops in one process: they learn, draw, hand parts on, and refuse what cannot work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stage_inputs import Shop

from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from training.config import override
from training.run import TrainResult, train

Run = Callable[..., TrainResult]


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "denoiser"])
def test_stage_learns_and_draws(run_stage: Run, tmp_path: Path, stage: str) -> None:
    lr = {"autoencoder": 5e-3, "decoder": 5e-3, "denoiser": 3e-3}[stage]
    result = run_stage(
        stage, f"{stage}.steps=40", f"{stage}.lr={lr}", f"{stage}.grid_every=40", f"{stage}.log_every=10"
    )
    assert result.steps == 40 and result.last_loss < 0.95 * result.first_loss
    assert [line["step"] for line in lines(tmp_path / stage)][-1] == 40
    before, after = (np.asarray(Image.open(path)) for path in sorted((tmp_path / stage / "grids").iterdir()))
    assert after.std() > 5 and not np.array_equal(before, after)  # before the first step, and after the last


def test_bundle_carries_averaged_weights_and_the_parts_before(run_stage: Run, shop: Shop, tmp_path: Path) -> None:
    result = run_stage("decoder", "decoder.ema_warmup=false", "decoder.ema_decay=0.9")
    before, after = load_bundle(shop.bundle), load_bundle(result.bundle)
    assert after.meta["weights"] == "ema" and after.meta["stages"]["decoder"]["steps"] == 4
    assert after.autoencoder.identity() == before.autoencoder.identity()
    assert after.decoder is not None and after.denoiser is not None and before.denoiser is not None
    state = torch.load(tmp_path / "decoder/checkpoints/step-00000004/state.pt", weights_only=True)["module"]
    assert any(not torch.equal(state[name], tensor) for name, tensor in after.decoder.state_dict().items())
    assert same_weights(before.denoiser, after.denoiser)


def test_align_leaves_the_decoder_alone_and_trains_the_denoiser(run_stage: Run, shop: Shop) -> None:
    result = run_stage("align", "align.loss=l1", "align.crop=12", "align.min_size=20", "align.max_size=40")
    before, after = load_bundle(shop.bundle), load_bundle(result.bundle)
    assert before.decoder and after.decoder and before.denoiser and after.denoiser
    assert same_weights(before.decoder, after.decoder)
    assert not torch.equal(before.denoiser.unet.conv_in.weight, after.denoiser.unet.conv_in.weight)
    assert {"loss_dm", "loss_recon"} <= set(result.metrics)


def test_accumulated_gradients_give_the_same_training(run_stage: Run, tmp_path: Path) -> None:
    whole = run_stage("denoiser", run_dir=tmp_path / "whole")
    parts = run_stage("denoiser", "denoiser.micro_batch=1", run_dir=tmp_path / "parts")
    assert parts.last_loss == pytest.approx(whole.last_loss, rel=1e-5)
    assert parts.sample_order == whole.sample_order


def test_activation_checkpointing_changes_nothing_but_memory(run_stage: Run, tmp_path: Path) -> None:
    plain = run_stage("denoiser", run_dir=tmp_path / "plain")
    frugal = run_stage("denoiser", "denoiser.activation_checkpointing=true", run_dir=tmp_path / "frugal")
    assert frugal.last_loss == pytest.approx(plain.last_loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_network_trains_the_same(run_stage: Run, tmp_path: Path) -> None:
    settings = ["denoiser.steps=2"]
    plain = run_stage("denoiser", *settings, run_dir=tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    compiled = run_stage("denoiser", *settings, "denoiser.compile=true", run_dir=tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.last_loss == pytest.approx(plain.last_loss, rel=1e-5)


def test_adversarial_and_perceptual_terms(run_stage: Run, tmp_path: Path) -> None:
    terms = ["perceptual_weight=0.1", "lpips_weights=random", "adversarial_weight=0.1", "adversarial_start=1"]
    settings = [f"autoencoder.{term}" for term in terms]
    result = run_stage("autoencoder", *settings, run_dir=tmp_path / "whole")
    assert {"lpips", "generator", "l1", "kl"} <= set(result.metrics)
    run_stage("autoencoder", *settings, "autoencoder.steps=2", run_dir=tmp_path / "halves")
    again = run_stage("autoencoder", *settings, run_dir=tmp_path / "halves")
    assert again.resumed_from == 2 and again.last_loss == result.last_loss


def test_vector_quantised_autoencoder(run_stage: Run) -> None:
    result = run_stage("autoencoder", "model.autoencoder.kind=vq", "model.autoencoder.num_embeddings=16")
    assert "codebook" in result.metrics


def test_super_resolution_sees_the_condition(sr_shop: Shop, tmp_path: Path) -> None:
    preset = override(sr_shop.preset, ["denoiser.grid_every=4", "align.grid_every=4"])
    common = {"data": sr_shop.data, "device": "cpu"}
    denoiser = train("denoiser", preset, run_dir=str(tmp_path / "d"), bundle=sr_shop.bundle, **common)  # type: ignore[arg-type]
    train("align", preset, run_dir=str(tmp_path / "a"), bundle=denoiser.bundle, **common)  # type: ignore[arg-type]
    grid = np.asarray(Image.open(tmp_path / "a/grids/samples-00000004.png"))
    assert grid.shape == (4 * 34, 4 * 34, 3)  # low-res | bicubic | ours | truth, four samples each


def test_loss_that_is_not_finite_names_the_samples(
    run_stage: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import training.stages.denoiser as stage

    calls = 0

    def broken(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls == 4 else 1.0)

    original = stage.denoising_loss
    monkeypatch.setattr(stage, "denoising_loss", broken)
    settings = ["denoiser.steps=8", "denoiser.log_every=8", "denoiser.checkpoint_every=2"]
    with pytest.raises(UserError, match=r"not finite at step 4; samples: 0\d\d.*checkpoint of step 2"):
        run_stage("denoiser", "denoiser.max_skipped_steps=0", *settings)
    assert not (tmp_path / "denoiser/checkpoints/step-00000004/manifest.json").exists()


def test_gradient_that_is_not_finite_is_in_no_checkpoint(
    run_stage: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loss of that step is a number still, and the step is one at which a checkpoint is due."""
    import training.stages.denoiser as stage

    losses: list[torch.Tensor] = []

    def steep(*arguments: torch.Tensor) -> torch.Tensor:
        loss = original(*arguments)
        losses.append(loss)
        if len(losses) == 4:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    original = stage.denoising_loss
    monkeypatch.setattr(stage, "denoising_loss", steep)
    settings = ["denoiser.steps=8", "denoiser.log_every=8", "denoiser.checkpoint_every=2"]
    with pytest.raises(UserError, match=r"gradient is not finite at step 4; samples: 0\d\d.*checkpoint of step 2"):
        run_stage("denoiser", "denoiser.max_skipped_steps=0", *settings)
    assert torch.isfinite(losses[3]) and not (tmp_path / "denoiser/checkpoints/step-00000004").exists()


def test_reporter_that_fails_does_not_stop_training(
    run_stage: Run, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise ConnectionError("tracking server is down")

    result = run_stage("denoiser", reporters=[Broken])  # type: ignore[list-item]
    assert result.steps == 4 and len(lines(tmp_path / "denoiser")) == 4
    assert caplog.text.count("tracking server is down") == 1


@pytest.mark.parametrize(
    ("stage", "settings", "options", "message"),
    [
        ("decoder", [], {"bundle": ""}, "train stage autoencoder first"),
        ("decoder", ["decoder.micro_batch=3"], {}, "micro_batch = 3"),
        ("decoder", ["decoder.min_size=40"], {}, "target sizes 40..32"),
        ("autoencoder", ["autoencoder.crop=30"], {}, "crop = 30 is not a multiple of 4"),
        ("decoder", ["decoder.precision=fp16"], {}, "fp16 needs a CUDA device"),
        ("align", ["model.decoder.mlp_width=20"], {}, "bundle's decoder has other settings"),
        ("denoiser", ["model.image_size=64"], {}, "32-pixel images and the model is for 64"),
        ("denoiser", [], {"data": "/nowhere"}, "nowhere"),
    ],
)
def test_errors_before_training(
    run_stage: Run, tmp_path: Path, stage: str, settings: list[str], options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_stage(stage, *settings, **options)
    assert not (tmp_path / stage / "checkpoints").exists()


def test_latents_of_another_encoder_are_refused(run_stage: Run, shop: Shop, tmp_path: Path) -> None:
    other = run_stage("autoencoder").bundle
    with pytest.raises(UserError, match="was encoded by autoencoder"):
        run_stage("decoder", bundle=other)
    with pytest.raises(UserError, match="pixels only"):
        run_stage("decoder", data=shop.pixels)
