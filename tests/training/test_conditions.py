"""Super-resolution stages train only on the conditions that the model will be given when it is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from stage_inputs import Shop

from pipeline.errors import UserError
from training.run import train


@pytest.mark.parametrize("stage", ["denoiser", "align"])
def test_conditions_enlarged_otherwise_than_the_model_does_are_refused(
    sr_shop: Shop, tmp_path: Path, stage: str
) -> None:
    model = dataclasses.replace(sr_shop.preset.model, condition_resize="nearest")
    preset = dataclasses.replace(sr_shop.preset, model=model)
    with pytest.raises(UserError, match="by 'bicubic', the model is for 'nearest'.*--condition-resize nearest"):
        train(stage, preset, data=sr_shop.data, run_dir=str(tmp_path / stage), bundle=sr_shop.bundle, device="cpu")
    assert not (tmp_path / stage / "run.json").exists()
