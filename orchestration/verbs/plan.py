"""`latentzoom plan`: GPU hours, storage and cost of a data set before anything is rented, with the arithmetic."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from orchestration.plan import DataSet


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from orchestration.plan import DATA_SETS, Rates

    parser = argparse.ArgumentParser(
        prog="latentzoom plan",
        description="Size up preprocessing, training, evaluation and storage. Rates and prices are assumptions by "
        "default: give what you measured (latentzoom preprocess --plan; mfu_percent of a short training run), and what "
        "you pay.",
    )
    add = parser.add_argument
    add("data_set", metavar="DATA", help=f"{', '.join(DATA_SETS)}, or any name together with --preset and --images")
    add("--preset", default="", help="default: the data set's")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the preset: denoiser.steps=1000000",
    )
    add("--images", type=int, default=0, help="default: the data set's")
    add("--crops", type=int, default=0, help="samples of one image")
    add("--source-gb", type=float, default=0.0, help="size of the source; default: the data set's")
    add("--times", type=float, default=1.0, help="a data set so many times as large; training steps stay the preset's")
    add("--gpus", type=int, default=8, help="workers of training")
    add("--evaluated", type=int, default=50_000, help="samples drawn for evaluation")
    add("--sampler-steps", type=int, default=50)
    for field in dataclasses.fields(Rates):
        add(f"--{field.name.replace('_', '-')}", type=float, default=field.default, help=_HELP[field.name])
    return parser


_HELP = {
    "peak_tflops": "dense bf16 peak of a GPU (published: H100 989, A100 312, L40S 362)",
    "mfu": "share of the peak that training reaches (assumed; see mfu_percent in metrics.jsonl)",
    "encode_mfu": "share of the peak that the encoder reaches (assumed)",
    "sample_mfu": "share of the peak that sampling reaches (assumed)",
    "png_ratio": "bytes of a PNG over those of its pixels (assumed)",
    "decode_per_core": "images of 1024² a second and core (assumed; see latentzoom preprocess --plan)",
    "gpu_hour": "price of a GPU hour in $ (assumed)",
    "cpu_hour": "price of a core hour in $ (assumed)",
    "gb_month": "price of a GB for a month in $ (assumed)",
    "months": "how long everything is kept",
}


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from orchestration import plan
    from training.config import override
    from training.presets import get_preset

    rates = plan.Rates(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(plan.Rates)})
    data = data_set(arguments)
    preset = override(get_preset(data.preset), arguments.set)
    rows = plan.size_up(
        data, preset, rates, gpus=arguments.gpus, evaluated=arguments.evaluated, steps=arguments.sampler_steps
    )
    print(f"{data.name} with preset {preset.name}, {arguments.gpus} GPUs")
    print(plan.table(rows))
    print("assumed: " + ", ".join(f"{name} {getattr(rates, name):g}" for name in _HELP))
    return 0


def data_set(arguments: argparse.Namespace) -> DataSet:
    """The data set of the command line: a known one with changes, or an own one."""
    from orchestration import plan

    known = plan.DATA_SETS.get(arguments.data_set)
    if known is None:
        if not (arguments.preset and arguments.images):
            raise UserError(
                f"{arguments.data_set!r} is not one of {', '.join(plan.DATA_SETS)}; give --preset and --images"
            )
        known = plan.DataSet(
            name=arguments.data_set, preset=arguments.preset, images=arguments.images, source_bytes=0.0
        )
    images = round((arguments.images or known.images) * arguments.times)
    if images < 1 or arguments.gpus < 1:
        raise UserError("--images, --times and --gpus must come to at least 1")
    source = 1e9 * arguments.source_gb or known.source_bytes * images / known.images
    return dataclasses.replace(
        known,
        images=images,
        source_bytes=source,
        crops=arguments.crops or known.crops,
        preset=arguments.preset or known.preset,
    )
