"""The table of `training.identity`: what makes a checkpoint, a finished result and a pipeline's step another one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from training.config import StageConfig, override
from training.identity import HOW_ONLY, MAY_CHANGE, WATCHING, Identity, step_settings
from training.presets import debug

PARTS = {"autoencoder": "a", "decoder": "d", "denoiser": "e"}


def identity(stage: str, *settings: str, data: str = "data", **parts: str) -> Identity:
    preset = override(debug(), list(settings))
    return Identity(stage=stage, settings=preset.stage(stage), model=preset.model, data=data, parts={**PARTS, **parts})


def answers(one: Identity) -> tuple[Any, str, str]:
    step = json.dumps(step_settings(one.stage, one.settings, one.model), sort_keys=True)
    return one.fingerprint(), one.digest(), step


def changed(stage: str, *settings: str, before: tuple[str, ...] = (), **others: str) -> tuple[bool, ...]:
    """Whether (a checkpoint, a finished result, a step) is another one with these settings besides those before."""
    pairs = zip(answers(identity(stage, *before)), answers(identity(stage, *before, *settings, **others)))
    return tuple(old != new for old, new in pairs)


@pytest.mark.parametrize(
    ("stage", "setting", "expected"),
    [
        ("denoiser", "denoiser.global_batch=8", (True, True, True)),
        ("denoiser", "denoiser.lr=0.5", (False, True, True)),
        ("denoiser", "denoiser.steps=9", (False, True, True)),
        ("denoiser", "denoiser.loader_threads=9", (False, False, False)),
        ("denoiser", "denoiser.validate_every=9", (False, False, False)),
        ("denoiser", "model.denoiser.base_width=16", (True, True, True)),
        ("autoencoder", "model.denoiser.base_width=16", (False, True, False)),
        ("decoder", "model.denoiser.base_width=16", (False, True, False)),
        ("decoder", "model.decoder.mlp_width=24", (True, True, True)),
        ("autoencoder", "align.lr=0.5", (False, False, False)),
    ],
)
def test_settings(stage: str, setting: str, expected: tuple[bool, ...]) -> None:
    assert changed(stage, setting) == expected


def test_what_is_watched_counts_where_a_stage_may_end_early_by_it() -> None:
    early = ("denoiser.early_stop_patience=2",)
    assert changed("denoiser", "denoiser.validate_every=9", before=early) == (False, True, True)
    assert changed("denoiser", "denoiser.loader_threads=9", before=early) == (False, False, False)


@pytest.mark.parametrize(
    ("stage", "part", "goes_on"),
    [("align", "decoder", False), ("align", "denoiser", False), ("align", "autoencoder", True),
     ("denoiser", "decoder", True), ("denoiser", "denoiser", True)],
)  # fmt: skip
def test_weights(stage: str, part: str, goes_on: bool) -> None:
    """Latents come from the data, which names who made them; a decoder is rendered with where the stage does so."""
    assert changed(stage, **{part: "other"}) == (not goes_on, True, False)
    assert changed(stage, data="other") == (True, True, False)


def test_an_address_counts_by_the_weights_that_lie_there() -> None:
    here, there = ("denoiser.start=/here/bundle",), ("denoiser.start=/there/bundle",)
    assert changed("denoiser", *there, before=here) == (False, True, True)
    assert changed("denoiser", *here, before=("denoiser.start=bundle",)) == (False, True, True)
    assert changed("denoiser", before=here, denoiser="other")[0] and changed("denoiser", *here)[0]


def test_the_three_groups_name_fields_of_every_stage_and_have_none_in_common() -> None:
    fields = {field.name for field in dataclasses.fields(StageConfig)}
    assert fields >= HOW_ONLY | WATCHING | MAY_CHANGE
    assert len(HOW_ONLY) + len(WATCHING) + len(MAY_CHANGE) == len(HOW_ONLY | WATCHING | MAY_CHANGE)


def test_a_difference_is_told_in_words() -> None:
    mine, other = identity("align"), identity("align", "align.global_batch=8").fingerprint()
    assert mine.difference(mine.fingerprint()) == ""
    assert mine.difference(other) == "global_batch was 8, is 4"
    assert mine.difference(identity("align", data="other", decoder="x").fingerprint()) == "different data and bundle"
