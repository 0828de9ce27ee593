"""The evaluation as training asks it for early figures: a few hundred samples of the model as it is, without intervals.

`make_quality` is given to `training.run.train`. Figures are those of `latentzoom evaluate` on as many samples: made
pictures by KID (and FID where there are more samples than features), enlarged ones by PSNR and LPIPS.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from orchestration.evaluation.chunk import ChunkWorker
from orchestration.evaluation.data import open_pictures
from orchestration.evaluation.networks import with_found_lpips
from orchestration.evaluation.spec import EvaluationSpec, scale_name
from pipeline import storage
from pipeline.bundle import Bundle
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.metrics.gaussian import FeatureStatistics, frechet_distance
from pipeline.metrics.kid import kid
from pipeline.model import LatentZoom
from training.context import Context
from training.quality import Arrays, Quality

_SAMPLER_STEPS = 20


def make_quality(context: Context) -> Quality | None:
    """Of the stages that make a model whose pictures can be judged as a whole; None for the others, whose validation
    says it all, before there is an implicit decoder, and of a single sample, which has no distribution. `UserError`
    for weights that are not there."""
    config = context.config
    spec = quality_spec(context.stage, context.model, config.quality_samples, config.quality_inception)
    if spec is not None and spec.inception and not storage.exists(spec.inception):
        raise UserError(f"{context.stage}.quality_inception: no such file: {spec.inception}")
    if spec is not None and spec.task == "generation" and context.manifest.splits.get(spec.split, 0) < 2:
        return None
    has_decoder = context.stage == "decoder" or (context.bundle is not None and context.bundle.decoder is not None)
    return EarlyQuality(context, spec) if spec is not None and has_decoder else None


def quality_spec(stage: str, model: ModelConfig, num: int, inception: str = "") -> EvaluationSpec | None:
    """What is evaluated of a model: its pictures at the training size, or its enlargements to it."""
    num_steps = model.schedule.distilled_steps or _SAMPLER_STEPS
    common: dict[str, Any] = {"num": num, "num_pictures": 0, "num_steps": num_steps, "inception": inception}
    if model.task == "direct":
        if stage != "decoder":
            return None
        spec = EvaluationSpec(task="sr", scales=(2.0, 4.0), sr_mode="fixed-truth", **common)
    elif stage in ("autoencoder", "decoder"):
        return None
    elif model.task == "sr":
        scale = model.image_size / model.lr_size
        spec = EvaluationSpec(task="sr", scales=(scale,), sr_mode="fixed-input", **common)
    else:
        spec = EvaluationSpec(task="generation", sizes=(model.image_size,), **common)
    return with_found_lpips(spec)


class EarlyQuality:
    """See `training.quality.Quality`. Pictures and metric networks are opened once, at the first measurement."""

    def __init__(self, context: Context, spec: EvaluationSpec) -> None:
        self.pictures = open_pictures(context.data, spec.split)
        self.num, self.chunk = min(spec.num, self.pictures.num), spec.chunk_size
        self.spec = dataclasses.replace(spec, num=self.num)
        self.names = _names(self.spec)
        self.device = context.world.device
        self._worker: ChunkWorker | None = None

    @torch.no_grad()
    def measure(self, bundle: Bundle, start: int, stop: int) -> Arrays:
        model = LatentZoom(bundle, self.device)
        if self._worker is None:
            self._worker = ChunkWorker(self.spec, model, self.pictures, str(self.device))
        self._worker.model = model
        return {key: array for key, array in self._worker.run(start, stop).items() if not _is_baseline(key)}

    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for key, array in arrays.items():
            kind, name, method, setting = key.split("|")
            if kind == "value":
                figures[f"{'psnr' if name == 'psnr_rgb' else name}_{setting}"] = float(array.astype(np.float64).mean())
            elif method == "real" and name == ("inception" if self.spec.inception else "random_vgg"):
                stand_in = "" if self.spec.inception else "_random_vgg"
                side = setting.partition("x")[0]
                fake = arrays[f"feature|{name}|fake|{setting}"]
                figures[f"kid{stand_in}_x{side}"] = kid(array, fake, seed=self.spec.seed)[0]
                with contextlib.suppress(UserError):  # fewer samples than features
                    distance = frechet_distance(FeatureStatistics.of(array), FeatureStatistics.of(fake))
                    figures[f"fid{stand_in}_x{side}"] = distance
        return figures


def _names(spec: EvaluationSpec) -> tuple[str, ...]:
    """Of `EarlyQuality.figures`, those for which pictures or samples may prove too small included."""
    if spec.task == "generation":
        stand_in = "" if spec.inception else "_random_vgg"
        return tuple(f"{kind}{stand_in}_x{side}" for side in spec.sizes for kind in ("kid", "fid"))
    kinds = ("psnr", "ssim", "lpips" if spec.lpips else "lpips_random_vgg")
    return tuple(f"{kind}_{scale_name(scale)}" for scale in spec.scales for kind in kinds)


def _is_baseline(key: str) -> bool:
    """Figures of the usual enlargements, which stay the same."""
    kind, _, method, *_ = key.split("|")
    return kind == "picture" or (kind == "value" and method != "ours")
