"""Sampling latents and whole super-resolution, with the paper's shapes at a chosen share of its widths.

The straightforward way is what published scripts do: DDIM with 200 steps, then every pixel through the plain LIIF, in
float32 (half precision: under autocast), with the memory layout that networks come in. Its time is taken from as many
steps as ours and a band of the output, times their number, since it is the same work repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orchestration.bench.measure import alternate, autocast, macs_of, observe, quality
from orchestration.bench.table import Options, Row
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig
from pipeline.geometry import Window
from pipeline.liif import LiifHead
from pipeline.model import LatentZoom
from pipeline.reference import render_reference
from pipeline.sampling import Sampler

IMAGE = 128
"""Pixels a side at which the model is trained."""
LOW = 16
STEPS = 20
PUBLISHED_STEPS = 200
_BAND = 30_000
"""Pixels of the straightforward way that are timed."""


def sr_model(options: Options, *, is_plain: bool = False) -> LatentZoom:
    """Faces SR 16 → 128 of the paper, untrained: latents of 32 × 32 cells, widths scaled by `options.width`.

    is_plain: the same weights in float32 and contiguous, whatever `options` say."""

    def scaled(base: int) -> int:
        return max(32, round(base * options.width / 32) * 32)

    model = ModelConfig(
        name="bench",
        task="sr",
        image_size=IMAGE,
        lr_size=LOW,
        autoencoder=AutoencoderConfig(base_width=scaled(128), width_mult=(1, 2, 4)),
        decoder=DecoderConfig(base_width=scaled(128), width_mult=(1, 2, 4)),
        denoiser=DenoiserConfig(
            base_width=scaled(160), width_mult=(1, 2, 2, 4), attention_factors=(4, 8), head_channels=32
        ),
    )
    torch.manual_seed(0)
    bundle = Bundle(model, build_autoencoder(model), build_decoder(model), build_denoiser(model))
    if not is_plain:
        return LatentZoom(bundle, options.device, getattr(torch, options.dtype))
    plain = LatentZoom(bundle, options.device)
    for part in (plain.autoencoder, plain.decoder, plain.denoiser):
        assert part is not None
        part.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return plain


def bench_sampling(options: Options, peak: float) -> list[Row]:
    """Images/s by sampler, on CUDA also in batches and compiled. Differences are to the same sampler with the plain
    float32 network."""
    model, plain = sr_model(options), sr_model(options, is_plain=True)
    cases: list[tuple[Sampler, int]] = [("ddim", 1), ("dpm++", 1)]
    is_thorough = options.device.startswith("cuda") and not options.quick
    cases += [("dpm++", 8)] if is_thorough else []
    runs = {"plain": _plain_steps(plain, options)}
    runs |= {f"{sampler} {STEPS} steps, batch {num}": _sampling(model, num, sampler) for sampler, num in cases}
    seconds = alternate(runs, options.rounds, options.device)
    slow = seconds.pop("plain") * PUBLISHED_STEPS / STEPS
    macs = _step_macs(plain)
    name = f"straightforward: ddim {PUBLISHED_STEPS} steps"
    rows = [_sampling_row(name, slow, 1, PUBLISHED_STEPS * macs / peak, slow, note=f"timed with {STEPS} steps")]
    for (name, taken), (sampler, num) in zip(seconds.items(), cases):
        seen = _seen(runs[name], _sampling(plain, num, sampler), options)
        rows.append(_sampling_row(name, taken, num, num * STEPS * macs / peak, slow, *seen))
    if is_thorough:
        name, run = f"dpm++ {STEPS} steps, batch 1, compiled", _sampling(model, 1, "dpm++")
        model.compile()
        taken = alternate({name: run}, options.rounds, options.device)[name]
        rows.append(
            _sampling_row(name, taken, 1, STEPS * macs / peak, slow, *_seen(run, _sampling(plain, 1, "dpm++"), options))
        )
    return rows


def bench_sr(options: Options, peak: float) -> list[Row]:
    """Images/s of whole super-resolution at batch 1: condition, sampling, decoding, by scale. On CUDA the denoiser is
    compiled, unless `options` say quick."""
    is_cuda = options.device.startswith("cuda")
    model, plain = sr_model(options), sr_model(options, is_plain=True)
    if is_cuda and not options.quick:
        model.compile()
    rows = []
    for scale in (8,) if options.quick else (8, 12, 30, 100) if is_cuda else (8, 12, 30):
        rows.append(_sr_row(model, plain, scale, options, peak))
    return rows


def _sr_row(model: LatentZoom, plain: LatentZoom, scale: int, options: Options, peak: float) -> Row:
    side = LOW * scale
    # Without the outermost cells: where their centres are pixels, the straightforward weights are 0 / 0.
    margin = side // model.config.latent_size
    num_rows = min(side - 2 * margin, max(1, _BAND // side))
    window = (margin, margin, margin + num_rows, side - margin)
    image = torch.rand(1, 3, LOW, LOW, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def latent_of(either: LatentZoom) -> Tensor:
        return either.sample_latents(condition=either.condition(image), sampler="dpm++", num_steps=STEPS)

    latent = torch.randn(1, model.config.autoencoder.latent_channels, *(model.config.latent_size,) * 2)
    features = plain.features(latent)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: model.decode(latent_of(model), (side, side)),
        "front": autocast(lambda: plain.features(plain.condition(image)), options),
        "steps": _plain_steps(plain, options),
        "pixels": autocast(lambda: _plain_window(plain, features, side, window), options),
    }
    seconds = alternate(runs, options.rounds, options.device)
    pixels = seconds["pixels"] * side**2 / (num_rows * (side - 2 * margin))
    slow = seconds["front"] + seconds["steps"] * PUBLISHED_STEPS / STEPS + pixels
    exact = _plain_window(plain, plain.features(latent_of(plain)), side, window)
    result, memory = observe(runs["ours"], options.device)
    difference, psnr = quality(exact, result[:, :, window[0] : window[2], window[1] : window[3]])
    macs = macs_of(lambda: plain.features(plain.condition(image))) + STEPS * _step_macs(plain)
    macs += _head(plain).macs_per_pixel(side / model.config.latent_size) * side**2
    return Row(
        part="sr",
        name=f"x{scale} ({LOW}² → {side}²)",
        rate=1.0 / seconds["ours"],
        unit="images/s",
        seconds=seconds["ours"],
        memory_mb=memory,
        share_of_peak=macs / seconds["ours"] / peak,
        ratio=slow / seconds["ours"],
        max_difference=difference,
        psnr_change=psnr,
        note=f"{STEPS} steps of dpm++ against {PUBLISHED_STEPS} of ddim; quality against the same steps, plainly",
    )


@torch.no_grad()
def _plain_window(plain: LatentZoom, features: Tensor, side: int, window: Window) -> Tensor:
    """A window of the output, by the straightforward evaluation."""
    return render_reference(_head(plain), features, (side, side), window)


def _head(model: LatentZoom) -> LiifHead:
    assert model.decoder is not None and isinstance(model.decoder.head, LiifHead)
    return model.decoder.head


def _condition(model: LatentZoom, num: int) -> Tensor:
    shape = num, model.config.autoencoder.latent_channels, *(model.config.latent_size,) * 2
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _sampling(model: LatentZoom, num: int, sampler: Sampler) -> Callable[[], Tensor]:
    condition = _condition(model, num)
    return lambda: model.sample_latents(condition=condition, sampler=sampler, num_steps=STEPS)


def _plain_steps(plain: LatentZoom, options: Options) -> Callable[[], Tensor]:
    return autocast(_sampling(plain, 1, "ddim"), options)


def _step_macs(plain: LatentZoom) -> float:
    """Of one evaluation of the denoiser for one image."""
    condition = _condition(plain, 1)
    return macs_of(lambda: plain.denoise(condition, torch.zeros(1, dtype=torch.int64), condition))


def _seen(run: Callable[[], Tensor], exact: Callable[[], Tensor], options: Options) -> tuple[float | None, float]:
    """Peak memory, and the largest difference of latents to the exact ones in standard deviations of those."""
    latent, memory = observe(run, options.device)
    reference = exact()
    return memory, float((latent.float() - reference).abs().max() / reference.std())


def _sampling_row(
    name: str,
    seconds: float,
    num: int,
    peak_seconds: float,
    slow: float,
    memory_mb: float | None = None,
    max_difference: float | None = None,
    note: str = "",
) -> Row:
    return Row(
        part="sampling",
        name=name,
        rate=num / seconds,
        unit="images/s",
        seconds=seconds,
        memory_mb=memory_mb,
        share_of_peak=peak_seconds / seconds,
        ratio=slow * num / seconds,
        max_difference=max_difference,
        note=note,
    )
