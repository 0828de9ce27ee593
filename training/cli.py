"""`latentzoom train STAGE --preset NAME --data SHARDS --run-dir RUNS [--bundle PARTS] [--set align.lr=1e-6 ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, exit_status
from pipeline.progress import format_seconds, log_format
from pipeline.redact import cleaned_output
from training.config import STAGES, Preset, override
from training.presets import PRESETS, get_preset
from training.stopping import stop_on_signals

if TYPE_CHECKING:
    from training.run import TrainResult


def parser(prog: str = "latentzoom train") -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Train one stage; run again to continue an interrupted run."
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--preset", required=True, help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--data", required=True, metavar="URL", help="folder of shards made by latentzoom preprocess")
    parser.add_argument("--run-dir", required=True, metavar="URL", help="checkpoints, figures and the bundle go here")
    parser.add_argument("--bundle", metavar="URL", help="parts from earlier stages (a run's bundle folder)")
    parser.add_argument(
        "--init",
        action="append",
        default=[],
        metavar="[PART=]START",
        help="fine-tune: what is trained starts from the weights of --bundle (bundle), of another bundle (its address, "
        "models:/NAME@champion, starter:faithful), or D_phi from the autoencoder's own decoder (autoencoder)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the preset, such as align.lr=1e-6",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the stage; raised later, the run goes on")
    parser.add_argument(
        "--local", action="store_true", help="no Ray: this process, or those that torchrun started beside it"
    )
    parser.add_argument(
        "--engine",
        choices=("deepspeed", "ddp", "local"),
        help="deepspeed partitions optimizer state, gradients or weights (zero_stage); ddp is PyTorch's distributed "
        "data parallel, enough for models of some hundred million parameters; local is one process, as --local. "
        "Default: deepspeed on Ray workers; with --local ddp under torchrun, else local",
    )
    parser.add_argument("--workers", default="1", metavar="N|MIN:MAX", help="Ray Train workers; a range is elastic")
    parser.add_argument(
        "--gpus-per-worker",
        type=float,
        metavar="N",
        help="GPUs of each worker; 0 trains on CPUs. Default: one, where the cluster has GPUs",
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="how often workers that crashed are started again (-1: always); announced preemptions do not count",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is one")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads with --local (0: torch's choice)")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="look at so many optimizer steps: a torch trace in the run folder, and the ten costliest operations",
    )
    parser.add_argument(
        "--tracking-uri",
        help="MLflow tracking server or sqlite:/// file; default MLFLOW_TRACKING_URI, else ./mlflow.db",
    )
    parser.add_argument("--no-tracking", action="store_true", help="report to the run folder only")
    parser.add_argument("--dry-run", action="store_true", help="check, and print sizes, memory, steps and time")
    return parser


Run = Callable[[argparse.Namespace, Preset], "TrainResult"]


def main(argv: Sequence[str] | None = None, *, run: Run | None = None) -> int:
    """`run` trains as the arguments ask, on Ray Train workers too; without it only --local works."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format=log_format(sys.stderr))
    return exit_status(lambda: _run(arguments, run or _local_only))


def _run(arguments: argparse.Namespace, run: Run) -> int:
    from training.starts import with_init

    steps = [] if arguments.steps is None else [f"{arguments.stage}.steps={arguments.steps}"]
    preset = override(get_preset(arguments.preset), [*arguments.set, *steps])
    preset = with_init(preset, arguments.stage, arguments.init)
    arguments.local = arguments.local or arguments.engine == "local"
    if arguments.dry_run:
        from training.estimate import dry_run

        if arguments.engine == "ddp" or (arguments.local and arguments.engine != "deepspeed"):  # they split nothing
            preset = override(preset, [f"{arguments.stage}.zero_stage=0"])
        print(dry_run(arguments.stage, preset, parse_workers(arguments.workers)[1], arguments.device))
        return 0
    if arguments.local and (arguments.workers != "1" or arguments.gpus_per_worker is not None):
        raise UserError("--local trains in this process alone; leave out --workers and --gpus-per-worker, or --local")
    if arguments.profile < 0:
        raise UserError(f"--profile {arguments.profile} is not allowed; use a number of steps")
    result = run(arguments, preset)
    figures = f" in {format_seconds(result.seconds)}, loss {result.first_loss:.4g} → {result.last_loss:.4g}"
    print(f"{result.stage}: {result.steps} steps{figures if result.steps else ''}; bundle in {result.bundle}")
    return 0


def _local_only(arguments: argparse.Namespace, preset: Preset) -> TrainResult:
    if not arguments.local:
        raise UserError("training on Ray workers starts through `latentzoom train`; here only --local works")
    return train_here(arguments.stage, preset, **settings_of(arguments))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says to `train_here` besides stage and preset."""
    return {
        "data": arguments.data,
        "run_dir": arguments.run_dir,
        "bundle": arguments.bundle,
        "use_deepspeed": arguments.engine == "deepspeed",
        "device": arguments.device,
        "profile": arguments.profile,
        "threads": arguments.threads,
    }


def train_here(
    stage: str, preset: Preset, *, still_ours: Callable[[], None] = lambda: None, threads: int = 0, **settings: Any
) -> TrainResult:
    """`training.run.train` with its `settings` in this process; SIGTERM and Ctrl-C lead to a checkpoint at the next
    report, a second one stops at once.

    still_ours: raises when the run's folder was taken over by another job. threads: of torch on a CPU; 0: its own
    number."""
    import torch

    from training.run import train

    if threads:
        torch.set_num_threads(threads)
    with stop_on_signals(still_ours) as stop_requested:
        return train(stage, preset, stop_requested=stop_requested, **settings)


def parse_workers(text: str) -> tuple[int, int]:
    """ "2" → (2, 2); "1:4" → (1, 4)."""
    low, _, high = text.partition(":")
    try:
        numbers = int(low), int(high or low)
    except ValueError as error:
        raise UserError(f"--workers {text!r} is not allowed; use a number such as 2 or a range such as 1:4") from error
    if not 1 <= numbers[0] <= numbers[1]:
        raise UserError(f"--workers {text!r} is not allowed; use a range from at least 1 upwards")
    return numbers


if __name__ == "__main__":
    with cleaned_output(sys.argv[1:]):
        status = main()
    sys.exit(status)
