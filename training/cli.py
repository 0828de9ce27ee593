"""`latentzoom train STAGE --preset NAME --data SHARDS --run-dir RUNS [--bundle PARTS] [--set align.lr=1e-6 ...]`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pipeline.command_line import Device, Flag, Repeated, parse, plain_help
from pipeline.command_log import alone
from pipeline.common_options import answer, console_log, did_you_mean, taken
from pipeline.config import to_dict
from pipeline.errors import MANY, UserError, exit_status, require_range
from pipeline.progress import format_seconds
from training.config import STAGES, Preset, override
from training.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from training.run import TrainResult


@plain_help
@dataclass(kw_only=True)
class Arguments:
    """Train one stage; run again to continue an interrupted run."""

    stage: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="|".join(STAGES))]
    """What is trained."""
    preset: Annotated[str, tyro.conf.arg(metavar="NAME", help=f"One of {', '.join(PRESETS)}.")]
    data: Annotated[str, tyro.conf.arg(metavar="URL")]
    """Folder of shards made by latentzoom preprocess."""
    run_dir: Annotated[str, tyro.conf.arg(metavar="URL")]
    """Checkpoints, figures and the bundle go here."""
    bundle: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Parts from earlier stages (a run's bundle folder)."""
    init: Annotated[Repeated, tyro.conf.arg(metavar="[PART=]START")] = ()
    """Fine-tune: what is trained starts from the weights of --bundle (bundle), of another bundle (its address,
    models:/NAME@champion, starter:faithful), or D_phi from the autoencoder's own decoder (autoencoder). May be given
    several times."""
    set: Annotated[Repeated, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """A setting of the preset, such as align.lr=1e-6. May be given several times."""
    steps: int | None = None
    """Steps of the stage; raised later, the run goes on."""
    local: Flag = False
    """No Ray: this process, or those that torchrun started beside it."""
    engine: Literal["deepspeed", "ddp", "local"] | None = None
    """deepspeed partitions optimizer state, gradients or weights (zero_stage); ddp is PyTorch's distributed data
    parallel, enough for models of some hundred million parameters; local is one process, as --local. Without it
    deepspeed on Ray workers; with --local ddp under torchrun, else local."""
    workers: Annotated[str, tyro.conf.arg(metavar="NUM|LEAST:MOST")] = "1"
    """Ray Train workers; a range is elastic."""
    gpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="N")] = None
    """GPUs of each worker; 0 trains on CPUs. Without it one, where the cluster has GPUs."""
    max_failures: int = 3
    """How often workers that crashed are started again (-1: always); announced preemptions do not count."""
    device: Device = ""
    """cpu, cuda, cuda:1; without it CUDA where there is one."""
    threads: int = 0
    """CPU threads with --local (0: torch's choice)."""
    profile: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Look at so many optimizer steps: a torch trace in the run folder, and the ten costliest operations."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow tracking server or sqlite:/// file; without it MLFLOW_TRACKING_URI, else ./mlflow.db."""
    no_tracking: Flag = False
    """Report to the run folder only."""
    dry_run: Flag = False
    """Check, and print sizes, memory, steps and time."""

    def __post_init__(self) -> None:
        require_range(self, 1, MANY, "steps")
        require_range(self, 0, MANY, "profile")
        require_range(self, -1, MANY, "max_failures")
        require_range(self, 0, 4096, "threads")
        require_range(self, 0, 1000, "gpus_per_worker")

    def whole(self) -> dict[str, Any]:
        """All settings of the preset, for --show-config."""
        return {"set": whole_preset(self.preset, self.set)}


def whole_preset(name: str, assignments: Sequence[str]) -> dict[str, Any]:
    """Every setting of a preset with changes, as `override` takes them."""
    settings = to_dict(override(get_preset(name), list(assignments)))
    settings.pop("name")
    return settings


Run = Callable[[Arguments, Preset], "TrainResult"]


def main(argv: Sequence[str] | None = None, *, run: Run | None = None) -> int:
    """`run` trains as the arguments ask, on Ray Train workers too; without it only --local works."""

    def command() -> int:
        with taken("train", sys.argv[1:] if argv is None else argv) as words:
            arguments = parse(Arguments, words, prog="latentzoom train")
            console_log()
            return _run(arguments, run or _local_only)

    return exit_status(command)


def _run(arguments: Arguments, run: Run) -> int:
    from training.starts import with_init

    if arguments.stage not in STAGES:
        near = did_you_mean(arguments.stage, STAGES)
        raise UserError(f"no stage {arguments.stage!r}{near}; use one of {', '.join(STAGES)}")
    steps = [] if arguments.steps is None else [f"{arguments.stage}.steps={arguments.steps}"]
    preset = override(get_preset(arguments.preset), [*arguments.set, *steps])
    preset = with_init(preset, arguments.stage, list(arguments.init))
    arguments.local = arguments.local or arguments.engine == "local"
    if arguments.dry_run:
        from training.estimate import needed

        if arguments.engine == "ddp" or (arguments.local and arguments.engine != "deepspeed"):  # they split nothing
            preset = override(preset, [f"{arguments.stage}.zero_stage=0"])
        need = needed(arguments.stage, preset, parse_workers(arguments.workers)[1], arguments.device)
        answer(need.text(), need.facts)
        return 0
    if arguments.local and (arguments.workers != "1" or arguments.gpus_per_worker is not None):
        raise UserError("--local trains in this process alone; leave out --workers and --gpus-per-worker, or --local")
    result = run(arguments, preset)
    figures = f" in {format_seconds(result.seconds)}, loss {result.first_loss:.4g} → {result.last_loss:.4g}"
    answer(f"{result.stage}: {result.steps} steps{figures if result.steps else ''}; bundle in {result.bundle}", result)
    return 0


def _local_only(arguments: Arguments, preset: Preset) -> TrainResult:
    if not arguments.local:
        raise UserError("training on Ray workers starts through `latentzoom train`; here only --local works")
    return train_here(arguments.stage, preset, **settings_of(arguments))


def settings_of(arguments: Arguments) -> dict[str, Any]:
    """What the command line says to `train_here` besides stage and preset."""
    return {
        "data": arguments.data,
        "run_dir": arguments.run_dir,
        "bundle": arguments.bundle,
        "use_deepspeed": arguments.engine == "deepspeed",
        "device": arguments.device or None,
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
    from training.stopping import stop_on_signals

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
    sys.exit(alone("train", main, sys.argv[1:]))
