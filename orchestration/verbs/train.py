"""`latentzoom train`: training/cli.py with MLflow and Ray Train behind it, one job at a time in a run folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from training import cli
from training.config import Preset
from training.reporter import Reporter

if TYPE_CHECKING:
    from orchestration.stage_run import Spec
    from training.run import TrainResult


def main(argv: list[str]) -> int:
    """Train one stage, in this process with --local or on Ray Train workers."""
    return cli.main(argv, run=run)


def run(arguments: cli.Arguments, preset: Preset) -> TrainResult:
    """Train as the arguments ask, with an MLflow run."""
    from orchestration.chain.lease import sole_job
    from orchestration.devices import worker_gpus
    from orchestration.outages import patiently
    from orchestration.starts import pinned, pinned_uri, place, places
    from pipeline import storage

    gpus = arguments.gpus_per_worker if arguments.local else worker_gpus(arguments.device, arguments.gpus_per_worker)
    store = arguments.tracking_uri
    preset = pinned(preset, [arguments.stage], store)
    with (
        sole_job(storage.absolute(arguments.run_dir), "training", "--run-dir") as still_ours,
        _tracked(arguments, preset) as spec,
    ):
        run_dir = storage.absolute(arguments.run_dir)
        found = places(preset, arguments.stage, run_dir, store, local=arguments.local)
        if arguments.bundle:
            arguments.bundle = place(pinned_uri(arguments.bundle, store), run_dir, store, local=arguments.local)
        if arguments.local:
            from orchestration.evaluation.early import make_quality
            from orchestration.mlflow_reporter import MlflowReporter

            reporters: list[Callable[[], Reporter]] = [lambda: MlflowReporter(**spec)] if spec else []
            begin_here = partial(
                cli.train_here,
                arguments.stage,
                preset,
                still_ours=still_ours,
                reporters=reporters,
                places=found,
                make_quality=make_quality,
                **cli.settings_of(arguments),
            )
            return patiently(begin_here, arguments.stage)
        from orchestration.ray_train import launch

        low, high = cli.parse_workers(arguments.workers)
        begin = partial(
            launch,
            arguments.stage,
            preset,
            data=arguments.data,
            run_dir=arguments.run_dir,
            bundle=arguments.bundle,
            num_workers=low if low == high else (low, high),
            gpus_per_worker=gpus,
            engine="ddp" if arguments.engine == "ddp" else "deepspeed",
            max_failures=arguments.max_failures,
            reporter_spec=spec,
            still_ours=still_ours,
            places=found,
            profile=arguments.profile,
        )
        return patiently(begin, arguments.stage)


@contextlib.contextmanager
def _tracked(arguments: cli.Arguments, preset: Preset) -> Iterator[Spec | None]:
    """The stage's MLflow run; none with --no-tracking, or, with a warning, when the store cannot be reached."""
    from orchestration import tracking
    from orchestration.stage_run import stage_run

    with contextlib.ExitStack() as stack:
        spec = None
        if not arguments.no_tracking:
            uri = tracking.tracking_uri(arguments.tracking_uri)
            places = {"data": arguments.data, "run_dir": arguments.run_dir}
            try:
                spec = stack.enter_context(stage_run(uri, arguments.stage, preset, **places))
            except tracking.StoreError as error:
                print(
                    f"latentzoom: warning: {error}; figures stay in {arguments.run_dir} until this "
                    "command is run again while the store answers",
                    file=sys.stderr,
                )
        yield spec
