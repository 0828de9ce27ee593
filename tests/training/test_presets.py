"""The paper's presets: its sizes, and every stage steps once at reduced width through the overrides people use."""

import math
from pathlib import Path

import pytest
from small_shop import make_shop

from pipeline.errors import UserError
from training.config import STAGES, Preset, override, preset_from_dict, preset_to_dict
from training.presets import PRESETS, demo, get_preset
from training.run import train
from training.targets import size_range

PAPER = ("ffhq-256", "celebahq-sr-16-128", "lsun-bedroom-256", "lsun-church-256", "lsun-tower-sr-256", "div2k-sr")
# name: (image, LR, f, smallest and largest target, beta range)
SIZES = {
    "ffhq-256": (256, 0, 4, 64, 256, 0.0015, 0.0195),
    "celebahq-sr-16-128": (128, 16, 4, 32, 128, 1e-4, 0.015),
    "lsun-bedroom-256": (256, 0, 4, 64, 256, 0.0015, 0.0195),
    "lsun-church-256": (256, 0, 8, 32, 256, 0.0015, 0.0155),
    "lsun-tower-sr-256": (256, 16, 4, 64, 256, 1e-4, 0.015),
    "div2k-sr": (192, 48, 4, 48, 192, 0.0015, 0.0155),
}


def narrow(preset: Preset) -> Preset:
    """The same sizes, levels and schedules at a sixteenth of the width, two steps and two samples."""
    settings = []
    for part in ("autoencoder", "decoder", "denoiser"):
        settings += [f"model.{part}.base_width=8", f"model.{part}.norm_groups=4", f"model.{part}.num_res_blocks=1"]
    settings += ["model.denoiser.head_channels=8", "model.decoder.mlp_width=16", "model.autoencoder.num_embeddings=64"]
    settings += ["model.autoencoder.mid_attention=false", "model.decoder.mid_attention=false"]
    for stage in STAGES:
        settings += [f"{stage}.steps=1", f"{stage}.global_batch=1", f"{stage}.precision=fp32", f"{stage}.grid_every=0"]
    return override(preset, settings)


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_the_papers(name: str) -> None:
    preset = get_preset(name)
    model = preset.model
    image, lr, factor, low, high, beta_start, beta_end = SIZES[name]
    assert (model.image_size, model.lr_size, model.autoencoder.factor) == (image, lr, factor)
    assert size_range(preset.decoder, model) == size_range(preset.align, model) == (low, high)
    assert (model.schedule.beta_start, model.schedule.beta_end) == (beta_start, beta_end)
    assert (model.decoder.base_width, model.decoder.mlp_width, model.decoder.mlp_depth) == (128, 256, 4)
    assert (preset.decoder.lr, preset.align.lr, preset.denoiser.ema_decay) == (5e-5, 1e-6, 0.9999)


@pytest.mark.parametrize("name", PAPER)
def test_every_stage_steps_once_at_reduced_width(name: str, tmp_path: Path) -> None:
    preset = narrow(get_preset(name))
    if preset.model.task == "sr":
        preset = override(preset, ["one_step=true", "distill.teacher_steps=2"])
    shop = make_shop(tmp_path, preset, num=2)
    for stage in preset.stages:
        result = train(
            stage,
            preset,
            data=shop.pixels if stage == "autoencoder" else shop.data,
            run_dir=str(tmp_path / stage),
            bundle=None if stage == "autoencoder" else shop.bundle,
            device="cpu",
        )
        assert result.steps == 1
        assert math.isfinite(result.last_loss)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    assert preset_from_dict(preset_to_dict(get_preset(name))) == get_preset(name)


def test_more_minutes_train_the_demo_longer() -> None:
    assert demo(60).denoiser.steps > 5 * demo(10).denoiser.steps
    assert demo(60).model == demo(10).model


def test_unknown_names_are_errors() -> None:
    with pytest.raises(UserError, match="no preset 'ffhq'"):
        get_preset("ffhq")
    with pytest.raises(UserError, match="no setting 'denoiser.learning_rate'"):
        override(get_preset("debug"), ["denoiser.learning_rate=1"])
