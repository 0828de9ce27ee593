"""Sampling latents and whole super-resolution, with the paper's shapes at a chosen share of its widths.

The straightforward way is what published scripts do: DDIM with 200 steps, then every pixel through the plain LIIF.
Its time is taken from one step and one band of the output, times their number, since it is the same work repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orchestration.bench import Options, Row, alternate
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig
from pipeline.liif import LiifHead
from pipeline.model import LatentZoom
from pipeline.reference import render_reference

STEPS = 20
PUBLISHED_STEPS = 200
_BAND = 30_000


def sr_model(options: Options) -> LatentZoom:
    """Faces SR 16 → 128 of the paper, untrained: latents of 32 × 32 cells, widths scaled by `options.width`."""

    def scaled(base: int) -> int:
        return max(32, round(base * options.width / 32) * 32)

    model = ModelConfig(
        name="bench",
        task="sr",
        image_size=128,
        lr_size=16,
        autoencoder=AutoencoderConfig(base_width=scaled(128), width_mult=(1, 2, 4)),
        decoder=DecoderConfig(base_width=scaled(128), width_mult=(1, 2, 4)),
        denoiser=DenoiserConfig(
            base_width=scaled(160), width_mult=(1, 2, 2, 4), attention_factors=(4, 8), head_channels=32
        ),
    )
    torch.manual_seed(0)
    bundle = Bundle(model, build_autoencoder(model), build_decoder(model), build_denoiser(model))
    return LatentZoom(bundle, options.device, getattr(torch, options.dtype))


def bench_sampling(options: Options) -> list[Row]:
    """Images/s by sampler and batch."""
    model = sr_model(options)
    step = _steps(model, 1, 1, "ddim", options)
    rows = [_sampling_row("ddim 200 steps, batch 1", PUBLISHED_STEPS * step, 1, 1.0)]
    for batch in (1,) if options.quick else (1, 8):
        for sampler in ("ddim", "dpm++"):
            seconds = _steps(model, batch, STEPS, sampler, options)
            ratio = PUBLISHED_STEPS * step * batch / seconds
            rows.append(_sampling_row(f"{sampler} {STEPS} steps, batch {batch}", seconds, batch, ratio))
    if not options.quick and options.device.startswith("cuda"):
        model.compile()
        seconds = _steps(model, 1, STEPS, "dpm++", options)
        ratio = PUBLISHED_STEPS * step / seconds
        rows.append(_sampling_row(f"dpm++ {STEPS} steps, batch 1, compiled", seconds, 1, ratio))
    return rows


def bench_sr(options: Options) -> list[Row]:
    """Images/s of whole super-resolution at batch 1: condition, sampling, decoding, by scale."""
    model = sr_model(options)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    step = _steps(model, 1, 1, "ddim", options)
    rows = []
    for scale in (8,) if options.quick else (8, 12, 30) if options.device == "cpu" else (8, 12, 30, 100):
        side = 16 * scale

        def run(side: int = side) -> Tensor:
            latent = model.sample_latents(condition=model.condition(image), sampler="dpm++", num_steps=STEPS)
            return model.decode(latent, (side, side))

        plain_pixel = _plain_pixel(model, side)
        seconds = alternate({"ours": run, "plain": plain_pixel[0]}, options.rounds, options.device)
        plain = PUBLISHED_STEPS * step + seconds["plain"] / plain_pixel[1] * side * side
        rows.append(
            Row(
                part="sr",
                name=f"x{scale} (16² → {side}²)",
                rate=1.0 / seconds["ours"],
                unit="images/s",
                seconds=seconds["ours"],
                ratio=plain / seconds["ours"],
            )
        )
    return rows


def _plain_pixel(model: LatentZoom, side: int) -> tuple[Callable[[], object], int]:
    """The straightforward evaluation of a band of the output, and how many pixels that is."""
    decoder = model.decoder
    assert decoder is not None and isinstance(decoder.head, LiifHead)
    head = decoder.head
    latent = torch.randn(1, model.config.autoencoder.latent_channels, *(model.config.latent_size,) * 2)
    features = model.features(latent)
    num_rows = min(side, max(1, _BAND // side))

    @torch.no_grad()
    def run() -> Tensor:
        return render_reference(head, features, (side, side), (0, 0, num_rows, side))

    return run, num_rows * side


def _steps(model: LatentZoom, batch: int, num_steps: int, sampler: str, options: Options) -> float:
    size = (model.config.latent_size,) * 2
    condition = torch.randn(batch, model.config.autoencoder.latent_channels, *size)

    def run() -> Tensor:
        return model.sample_latents(condition=condition, sampler=sampler, num_steps=num_steps)  # type: ignore[arg-type]

    return alternate({"": run}, options.rounds, options.device)[""]


def _sampling_row(name: str, seconds: float, batch: int, ratio: float) -> Row:
    return Row(part="sampling", name=name, rate=batch / seconds, unit="images/s", seconds=seconds, ratio=ratio)
