"""Sizing: GPU hours, storage and cost of a data set, from counts and rates, with the arithmetic shown.

Nothing is run: networks are built without numbers to count their operations. What is measured or assumed is an
argument; `Rates` says which is which.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestration.text_table import text_table
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from training.config import Preset

_TAR_BLOCK = 512
_JSON_BYTES = 700


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """images and bytes of the source as published; crops: samples made of one image; edge: source pixels, about."""

    name: str
    preset: str
    images: int
    source_bytes: float
    crops: int = 1
    edge: int = 0


DATA_SETS = {
    "ffhq-256": DataSet(name="FFHQ", preset="ffhq-256", images=70_000, source_bytes=89.1e9, edge=1024),
    "lsun-bedroom-256": DataSet(
        name="LSUN Bedroom", preset="lsun-bedroom-256", images=3_033_042, source_bytes=42.8e9, edge=300
    ),
    "div2k-sr": DataSet(name="DIV2K", preset="div2k-sr", images=900, source_bytes=3.9e9, crops=64, edge=1700),
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """peak_tflops: a GPU's published dense bf16 peak. mfu: share of it that training reaches; encode_mfu, sample_mfu:
    that encoding and sampling reach (assumed). png_ratio: bytes of a PNG over bytes of its pixels (assumed; photographs
    0.5-0.7). decode_per_core: images of 1024² that one core decodes, crops and resizes a second (assumed; other sizes
    by area). gpu_hour, cpu_hour: price of one GPU, of one core. gb_month: price of storage. All prices are assumed."""

    peak_tflops: float = 989.0
    mfu: float = 0.15
    encode_mfu: float = 0.15
    sample_mfu: float = 0.15
    png_ratio: float = 0.6
    decode_per_core: float = 20.0
    gpu_hour: float = 3.0
    cpu_hour: float = 0.05
    gb_month: float = 0.023
    months: float = 3.0

    def __post_init__(self) -> None:
        for name in ("peak_tflops", "mfu", "encode_mfu", "sample_mfu", "png_ratio", "decode_per_core"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} = {getattr(self, name)} is not allowed; use a positive number")


@dataclass(frozen=True)
class Row:
    """One line: what, how it is computed, and the value in its unit ("GPU h", "core h", "GB", "$", "")."""

    what: str
    formula: str
    value: float
    unit: str


def size_up(data: DataSet, preset: Preset, rates: Rates, *, gpus: int, evaluated: int, steps: int) -> list[Row]:
    """All rows of a plan. gpus: workers of training. evaluated: samples drawn with `steps` sampler steps each."""
    rows = [*_preprocessing(data, preset.model, rates)]
    for stage in preset.stages:
        rows.append(_stage(stage, preset, rates, gpus, data.images * data.crops))
    rows.append(_evaluation(preset.model, rates, evaluated, 1 if preset.one_step else steps))
    rows += _storage(data, preset, rates, gpus)
    return [*rows, *_totals(rows, rates, gpus)]


def sample_bytes(model: ModelConfig, png_ratio: float) -> tuple[float, str]:
    """Bytes of one sample in its tar, and how they come about."""
    pixels = png_ratio * 3 * model.image_size**2
    cells = model.latent_size**2 * model.autoencoder.stored_channels * 2
    latents = 2 * (1 + (model.task == "sr"))  # the image and its flip; for SR the condition of each
    members = 2 + latents
    tar = members * 1.5 * _TAR_BLOCK + _JSON_BYTES  # a header each, and half a block of padding
    text = (
        f"PNG {png_ratio:g}·3·{model.image_size}² + {latents} latents of {model.latent_size}²·"
        f"{model.autoencoder.stored_channels}·2 + tar {tar:,.0f} bytes"
    )
    return pixels + latents * cells + tar, text


def _preprocessing(data: DataSet, model: ModelConfig, rates: Rates) -> list[Row]:
    samples = data.images * data.crops
    per_core = rates.decode_per_core * (1024 / data.edge) ** 2 if data.edge else rates.decode_per_core
    encodes = 2 * (1 + (model.task == "sr"))
    flops = encoder_flops(model)
    speed = rates.peak_tflops * 1e12 * rates.encode_mfu
    each, text = sample_bytes(model, rates.png_ratio)
    return [
        Row("samples", f"{data.images:,} images × {data.crops} crops", samples, ""),
        Row("decode", f"2 passes × {data.images:,} images / {per_core:.0f} a second and core",
            2 * data.images / per_core / 3600, "core h"),
        Row("encode", f"{samples:,} × {encodes} encodings × {flops / 1e9:,.0f} GFLOP / {_rate(speed)}",
            samples * encodes * flops / speed / 3600, "GPU h"),
        Row("shards", f"{samples:,} × ({text})", samples * each / 1e9, "GB"),
    ]  # fmt: skip


def encoder_flops(model: ModelConfig) -> float:
    """Floating-point operations to encode one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.bundle import build_autoencoder

    with torch.device("meta"):
        encoder = build_autoencoder(model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder.moments(torch.empty(1, 3, model.image_size, model.image_size))
    return float(counter.get_total_flops())


def _stage(stage: str, preset: Preset, rates: Rates, gpus: int, samples: int) -> Row:
    from training.estimate import estimate

    config = preset.stage(stage)
    found = estimate(stage, config, preset.model, gpus)
    speed = rates.peak_tflops * 1e12 * rates.mfu
    epochs = config.steps * config.global_batch / max(1, samples)
    formula = (
        f"{config.steps:,} steps of {config.global_batch} ({epochs:,.1f} epochs) × "
        f"{found.flops_per_step / 1e12:,.1f} TFLOP / {_rate(speed)}"
    )
    return Row(stage, formula, config.steps * found.flops_per_step / speed / 3600, "GPU h")


def _evaluation(model: ModelConfig, rates: Rates, evaluated: int, steps: int) -> Row:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.bundle import build_decoder, build_denoiser

    with torch.device("meta"), torch.no_grad():
        channels, cells, side = model.autoencoder.latent_channels, model.latent_size, model.image_size
        latent, t = torch.empty(1, channels, cells, cells), torch.empty(1, dtype=torch.int64)
        decoder = build_decoder(model)
        with FlopCounterMode(display=False) as draw:
            if model.task != "direct":
                build_denoiser(model)(latent, t, latent if model.task == "sr" else None)
        with FlopCounterMode(display=False) as render:
            decoder(latent, (side, side))
    each = steps * draw.get_total_flops() + render.get_total_flops()
    speed = rates.peak_tflops * 1e12 * rates.sample_mfu
    formula = (
        f"{evaluated:,} samples × ({steps} steps × {draw.get_total_flops() / 1e9:,.0f} + "
        f"{render.get_total_flops() / 1e9:,.0f} GFLOP) / {_rate(speed)}"
    )
    return Row("evaluate", formula, evaluated * each / speed / 3600, "GPU h")


def _storage(data: DataSet, preset: Preset, rates: Rates, gpus: int) -> list[Row]:
    from training.estimate import estimate

    rows = [Row("source", f"{data.name} as published", data.source_bytes / 1e9, "GB")]
    total, texts = 0.0, []
    for stage in preset.stages:
        num = estimate(stage, preset.stage(stage), preset.model, gpus).parameters
        keep = preset.stage(stage).keep
        total += 18 * num * keep  # half-precision weights, float32 masters, two moments, averages
        texts.append(f"{keep}·{num / 1e6:,.0f} M")
    rows.append(Row("checkpoints", f"18 bytes × ({' + '.join(texts)} parameters)", total / 1e9, "GB"))
    return rows


def _totals(rows: list[Row], rates: Rates, gpus: int) -> list[Row]:
    gpu = sum(row.value for row in rows if row.unit == "GPU h")
    core = sum(row.value for row in rows if row.unit == "core h")
    stored = sum(row.value for row in rows if row.unit == "GB")
    compute, months = gpu * rates.gpu_hour, rates.months
    kept = stored * rates.gb_month * months
    return [
        Row("GPU hours", "encode + training + evaluate", gpu, "GPU h total"),
        Row("wall time", f"{gpu:,.1f} GPU h / {gpus} GPUs", gpu / gpus, "h"),
        Row("storage", "shards + source + checkpoints", stored, "GB total"),
        Row("cost: GPUs", f"{gpu:,.1f} h × ${rates.gpu_hour:g}", compute, "$"),
        Row("cost: cores", f"{core:,.1f} h × ${rates.cpu_hour:g}", core * rates.cpu_hour, "$"),
        Row("cost: storage", f"{stored:,.1f} GB × {months:g} months × ${rates.gb_month:g}", kept, "$"),
        Row("cost", "GPUs + cores + storage", compute + core * rates.cpu_hour + kept, "$ total"),
    ]


def _rate(speed: float) -> str:
    return f"{speed / 1e12:,.0f} TFLOP/s"


def table(rows: list[Row]) -> str:
    """Columns: what, value with unit, how."""
    return text_table([(row.what, _value(row), f"= {row.formula}") for row in rows], right=(1,))


def _value(row: Row) -> str:
    unit = row.unit.removesuffix(" total")
    number = f"{row.value:,.0f}" if row.value >= 100 or not unit else f"{row.value:,.2f}"
    return f"${number}" if unit == "$" else f"{number} {unit}".rstrip()
