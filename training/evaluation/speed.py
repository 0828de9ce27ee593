"""Pictures a second and peak memory, by scale, of one loaded model."""

from __future__ import annotations

import dataclasses

import torch

from pipeline.metrics.speed import measure
from pipeline.model import LatentZoom
from training.evaluation.report import Figure, Report
from training.evaluation.spec import EvaluationSpec, scale_name, size_name


def with_speed(report: Report, spec: EvaluationSpec, model: LatentZoom, *, num: int = 3) -> Report:
    """The report with `fps` (pictures a second) and, where the device counts it, `peak_memory_mb` of the model added:
    whole upscaling runs for SR, decoding alone otherwise; the median of `num` runs after one."""
    device = str(model.device)
    latent = torch.zeros(1, model.config.autoencoder.latent_channels, *(model.config.latent_size,) * 2, device=device)
    side = model.config.lr_size or model.config.latent_size
    settings = [(scale_name(s), (round(side * s),) * 2) for s in spec.scales]
    settings += [(size_name((s, s)), (s, s)) for s in spec.sizes]
    is_sr = not model.renders_condition(spec.num_steps)
    what = f"sampling with {report.sampler} and decoding" if is_sr else "decoding alone"
    protocol = f"batch 1, {what}, {device}, median of {num} runs after one"

    def run(size: tuple[int, int]) -> None:
        z = latent
        if is_sr:
            z = model.sample_latents(
                condition=latent,
                sampler=spec.sampler,
                num_steps=model.evaluations(spec.num_steps),
                eta=spec.eta,
                condition_noise=spec.condition_noise,
            )
        model.decode(z, size)

    figures = list(report.figures)
    for setting, size in settings:
        seconds, peak = measure(lambda size=size: run(size), device=device, num=num)  # type: ignore[misc]
        for name, value in (("fps", 1.0 / seconds), ("peak_memory_mb", None if peak is None else peak / 2**20)):
            if value is None:
                continue
            figures.append(
                Figure(
                    name=name,
                    method="ours",
                    setting=setting,
                    value=value,
                    low=None,
                    high=None,
                    protocol=protocol,
                    num=num,
                )
            )
    return dataclasses.replace(report, figures=tuple(figures))
