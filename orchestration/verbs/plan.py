"""`latentzoom plan`: GPU hours, storage and cost of a data set before anything is rented, with the arithmetic."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from orchestration.sizing import Rates
from pipeline.command_line import Repeated, parse, plain_help
from pipeline.common_options import answer, did_you_mean
from pipeline.errors import MANY, UserError, require_range

if TYPE_CHECKING:
    from orchestration.sizing import DataSet

MOST = 1e12


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Size up preprocessing, training, evaluation and storage. Rates and prices are assumptions by default: give what
    you measured (latentzoom preprocess --dry-run; mfu_percent of a short training run), and what you pay."""

    data_set: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """ffhq-256, lsun-bedroom-256, div2k-sr, or any name together with --preset and --images."""
    preset: str = ""
    """Without it the data set's."""
    set: Annotated[Repeated, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of the preset: denoiser.steps=1000000. May be given several times."""
    images: int = 0
    """Without it the data set's."""
    crops: int = 0
    """Samples of one image."""
    source_gb: float = 0.0
    """Size of the source; without it the data set's."""
    times: float = 1.0
    """A data set so many times as large; training steps stay the preset's."""
    gpus: int = 8
    """Workers of training."""
    evaluated: int = 50_000
    """Samples drawn for evaluation."""
    steps: int = 50
    """Of the sampler."""
    peak_tflops: float = Rates.peak_tflops
    """Dense bf16 peak of a GPU (published: H100 989, A100 312, L40S 362)."""
    mfu: float = Rates.mfu
    """Share of the peak that training reaches (assumed; see mfu_percent in metrics.jsonl)."""
    encode_mfu: float = Rates.encode_mfu
    """Share of the peak that the encoder reaches (assumed)."""
    sample_mfu: float = Rates.sample_mfu
    """Share of the peak that sampling reaches (assumed)."""
    png_ratio: float = Rates.png_ratio
    """Bytes of a PNG over those of its pixels (assumed)."""
    decode_per_core: float = Rates.decode_per_core
    """Images of 1024² a second and core (assumed; see latentzoom preprocess --dry-run)."""
    gpu_hour: float = Rates.gpu_hour
    """Price of a GPU hour in $ (assumed)."""
    cpu_hour: float = Rates.cpu_hour
    """Price of a core hour in $ (assumed)."""
    gb_month: float = Rates.gb_month
    """Price of a GB for a month in $ (assumed)."""
    months: float = Rates.months
    """How long everything is kept."""

    def __post_init__(self) -> None:
        require_range(self, 0, MANY, "images", "crops", "evaluated", "steps")
        require_range(self, 1, 1_000_000, "gpus")
        require_range(self, 0, MOST, "source_gb", "gpu_hour", "cpu_hour", "gb_month", "months")
        require_range(self, 0, MOST, "times", "peak_tflops", "png_ratio", "decode_per_core", is_open=True)
        require_range(self, 0, 1, "mfu", "encode_mfu", "sample_mfu", is_open=True)

    @property
    def rates(self) -> Rates:
        return Rates(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Rates)})


def main(argv: list[str]) -> int:
    arguments = parse(Arguments, argv, prog="latentzoom plan")
    from orchestration import sizing as plan
    from training.config import override
    from training.presets import get_preset

    rates = arguments.rates
    data = data_set(arguments)
    preset = override(get_preset(data.preset), arguments.set)
    rows = plan.size_up(data, preset, rates, gpus=arguments.gpus, evaluated=arguments.evaluated, steps=arguments.steps)
    lines = [f"{data.name} with preset {preset.name}, {arguments.gpus} GPUs", plan.table(rows)]
    lines.append("assumed: " + ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(rates).items()))
    facts = {"data_set": data.name, "preset": preset.name, "gpus": arguments.gpus, "rows": rows, "assumed": rates}
    answer("\n".join(lines), facts)
    return 0


def data_set(arguments: Arguments) -> DataSet:
    """The data set of the command line: a known one with changes, or an own one."""
    from orchestration import sizing as plan

    known = plan.DATA_SETS.get(arguments.data_set)
    if known is None:
        if not (arguments.preset and arguments.images):
            raise UserError(
                f"{arguments.data_set!r} is not one of {', '.join(plan.DATA_SETS)}"
                f"{did_you_mean(arguments.data_set, plan.DATA_SETS)}; give --preset and --images"
            )
        known = plan.DataSet(
            name=arguments.data_set, preset=arguments.preset, images=arguments.images, source_bytes=0.0
        )
    images = round((arguments.images or known.images) * arguments.times)
    if images < 1:
        raise UserError("--images and --times must come to at least 1")
    source = 1e9 * arguments.source_gb or known.source_bytes * images / known.images
    return dataclasses.replace(
        known,
        images=images,
        source_bytes=source,
        crops=arguments.crops or known.crops,
        preset=arguments.preset or known.preset,
    )
