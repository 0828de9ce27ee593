"""The beginnings of several stages in a row, before the first of them: what a chain would only find out after days."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, outline
from training.agreement import check_use, take_over
from training.config import Preset, is_joint
from training.run import check_stage, require_beginning, student_model
from training.starts import with_starts


def rehearse(preset: Preset, stages: Sequence[str], bundle: str | None, places: Mapping[str, str]) -> None:
    """Raises the `UserError` that one of the stages would begin with, each on the bundle that the one before it leaves:
    parts that are missing, and settings of preset and bundles that disagree. Weights are not read.

    bundle: the first stage's. places: as in `training.run.train`.
    """
    held = outline(bundle) if bundle else None
    for stage in stages:
        config, model = preset.stage(stage), preset.model
        check_stage(stage, model)
        held, origins = with_starts(stage, config, model, held, places, outline)
        require_beginning(stage, model, held)
        if held is not None and stage != "autoencoder":
            model = take_over(stage, model, held, origins)
            check_use(stage, model, held)
        if stage == "distill":
            model = student_model(model)
        with torch.device("meta"):
            if stage == "autoencoder":
                joint = is_joint(config)
                decoder = build_decoder(model) if joint else None
                held = Bundle(model, build_autoencoder(model, has_decoder=not joint), decoder)
                continue
            held = held or Bundle(model, build_autoencoder(model))
            trained: dict[str, Any] = {"decoder": build_decoder(model)} if stage == "decoder" else {}
            held = dataclasses.replace(held, config=model, **(trained or {"denoiser": build_denoiser(model)}))
