"""What a chain's stages would begin with, known before the first of them: no data, no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stage_inputs import Shop

from pipeline import storage
from pipeline.bundle import PARTS, load_bundle, outline
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from training.config import override
from training.presets import PRESETS, debug, get_preset
from training.rehearsal import rehearse
from training.starts import with_init, with_whole


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"starter-sharp"}))
def test_every_preset_s_stages_follow_from_one_another(name: str) -> None:
    preset = get_preset(name)
    rehearse(preset, preset.stages, None, {})
    if preset.model.task == "sr":
        one_step = override(preset, ["one_step=true"])
        rehearse(one_step, one_step.stages, None, {})


def test_one_s_own_model_goes_on(shop: Shop) -> None:
    whole = with_whole(debug(), shop.bundle, shop.bundle)
    rehearse(whole, ["decoder", "denoiser", "align"], shop.bundle, {})
    rehearse(debug(), ["align"], shop.bundle, {})
    registered = with_init(debug(), "denoiser", ["models:/faces/1"])
    rehearse(registered, ["denoiser"], first(shop), {"models:/faces/1": shop.bundle})


def first(shop: Shop) -> str:
    return str(Path(shop.bundle).parent / "first")  # the autoencoder alone


@pytest.mark.parametrize(
    ("settings", "stages", "message"),
    [
        ([], ["decoder", "align"], "stage align needs a bundle with the denoiser"),
        ([], ["denoiser", "align"], "stage align needs a bundle with the decoder"),
        (["model.autoencoder.kind=vq"], ["decoder"], "autoencoder.kind = 'kl' in the bundle and 'vq' in the preset"),
        (["decoder.start=autoencoder"], ["decoder"], r"decoder.width_mult = \[1, 1, 2\] in the bundle and \[1, 2\] in"),
        ([], ["decoder", "distill"], "stage distill is for super-resolution by diffusion"),
    ],
)
def test_what_a_later_stage_would_lack_or_refuse(
    settings: list[str], stages: list[str], message: str, shop: Shop
) -> None:
    with pytest.raises(UserError, match=message) as error:
        rehearse(override(debug(), settings), stages, first(shop), {})
    assert "\n" not in str(error.value)


def test_a_denoiser_that_was_brought_keeps_its_schedule_to_the_last_stage(shop: Shop) -> None:
    other = override(debug(), ["model.schedule.beta_end=0.015"])
    rehearse(other, ["decoder"], shop.bundle, {})
    with pytest.raises(UserError, match="schedule.beta_end = 0.0195 in the bundle and 0.015 in the preset"):
        rehearse(other, ["decoder", "align"], shop.bundle, {})
    rehearse(other, ["decoder", "denoiser", "align"], shop.bundle, {})  # trained anew


def test_an_outline_has_everything_but_weights(shop: Shop, tmp_path: Path) -> None:
    url = str(tmp_path / "config only")
    Path(url).mkdir()
    storage.write_json(f"{url}/config.json", storage.read_json(f"{shop.bundle}/config.json"))
    whole, drawn = load_bundle(shop.bundle), outline(url)
    assert isinstance(drawn.config, ModelConfig) and drawn.config == whole.config and drawn.meta == whole.meta
    for name in PARTS:
        shapes = [{k: t.shape for k, t in getattr(b, name).state_dict().items()} for b in (whole, drawn)]
        assert shapes[0] == shapes[1]
        assert all(t.device == torch.device("meta") for t in getattr(drawn, name).state_dict().values())
