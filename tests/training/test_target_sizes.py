"""Target sizes of the alignment stages: the whole range, both ends included, and anti-aliased truths."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.resize import resize
from training.config import AlignStage, DecoderStage
from training.targets import Target, draw_target, size_range

MODEL = ModelConfig(image_size=32)  # latents of 8 cells


@pytest.mark.parametrize("stage", [DecoderStage(), AlignStage()])
def test_default_range_is_from_the_latent_to_the_image(stage: DecoderStage | AlignStage) -> None:
    """Stage 2 too, and for super-resolution as well."""
    for model in (MODEL, replace(MODEL, task="sr", lr_size=8)):
        assert size_range(stage, model) == (8, 32)


@pytest.mark.parametrize("kind", [DecoderStage, AlignStage])
def test_every_size_is_drawn_both_ends_included(kind: type[DecoderStage] | type[AlignStage]) -> None:
    config = kind(min_size=9, max_size=13, crop=0)
    sizes = Counter(draw_target(config, MODEL, step).size for step in range(500))
    assert sorted(sizes) == [(n, n) for n in range(9, 14)] and min(sizes.values()) > 60


def test_truth_is_anti_aliased_and_cropped() -> None:
    image = torch.ones(1, 3, 63, 63) * (1 - 2 * (torch.arange(63) % 2))
    truth = Target((21, 21), (4, 5, 12, 16)).truth(image)
    assert torch.equal(truth, resize(image, (21, 21))[:, :, 4:12, 5:16])
    assert float(truth.abs().max()) < 0.2


def test_empty_range() -> None:
    with pytest.raises(UserError, match=r"40\.\.32 are empty"):
        size_range(AlignStage(min_size=40), MODEL)
