"""Starts `training.run.train` on Ray Train workers: one call a stage, any number of workers, restarts included.

Checkpoints are the training code's own (in the run folder); Ray decides who runs, and starts workers again when some
die. Workers leave and join: with a range of workers a run goes on with fewer and grows back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO, cast

import torch

from orchestration.cluster.cluster_size import (
    await_room,
    cpus_for_each,
    gpus_of_each,
    lost_machines,
    machine_cpus,
    machines,
    reachable_resources,
)
from orchestration.cluster.elastic import idle_workers, scaling_among, worker_counts
from orchestration.cluster.fit import fit
from orchestration.cluster.relay import Relay, RelayStream
from orchestration.tracking.outages import Silent, is_outage
from pipeline import storage
from pipeline.errors import Stopped, UserError
from pipeline.redact import clean
from preprocess.local_ray import loopback_only
from training.config import Preset, override, preset_from_dict, preset_to_dict
from training.reporter import Reporter
from training.run import TrainResult, train
from training.stopping import Stop

_CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}


def start_ray(num_cpus: int | None = None, **options: Any) -> bool:
    """Start a local Ray, which listens on 127.0.0.1 only (or join the cluster of RAY_ADDRESS), unless one is joined
    already → whether it was started."""
    import ray

    for name, value in _CONTROLLER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, **options)
    else:
        # "local": without it Ray would join a cluster that someone else's `ray start` left on this machine.
        settings = {"address": "local", "include_dashboard": False, "log_to_driver": False, **options}
        with loopback_only():
            ray.init(num_cpus=num_cpus, logging_level=logging.WARNING, **settings)
    return True


def launch(
    stage: str,
    preset: Preset,
    *,
    data: str,
    run_dir: str,
    bundle: str | None = None,
    num_workers: int | tuple[int, int] = 1,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float | None = None,
    engine: Literal["deepspeed", "ddp"] = "deepspeed",
    reporter_spec: dict[str, Any] | None = None,
    max_failures: int = 3,
    resize_interval_s: float = 60.0,
    still_ours: Callable[[], None] = lambda: None,
    places: Mapping[str, str] | None = None,
    profile: int = 0,
) -> TrainResult:
    """Train one stage on Ray workers, with DeepSpeed or distributed data parallel, and wait for it.

    num_workers: a number, or (least, most) for an elastic run, which has those numbers of workers that share the global
    batch evenly. gpus_per_worker: 0 trains on CPUs; None takes one GPU a worker where the cluster has any.
    reporter_spec: arguments of `orchestration.tracking.mlflow_reporter.MlflowReporter`, built on the main worker; None
    reports to the run folder only.
    max_failures: how often workers are started again after a crash; each time training continues from the newest
    checkpoint. resize_interval_s: how often an elastic run looks for machines that came (or came back).
    still_ours: called twice a second; raises when the run folder was taken over, which ends the run. places: see
    `training.run.train`; what it names must be seen by every machine.
    profile: as of `training.run.train`.
    SIGTERM and Ctrl-C lead to a checkpoint and `Stopped`. Raises `UserError` for what the training code refuses.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from orchestration.cluster.rendezvous import RayNetwork

    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    if idle := idle_workers(stage, preset.stage(stage), least, most):
        print(f"latentzoom: warning: {idle}", file=sys.stderr, flush=True)
    counts = worker_counts(preset.stage(stage), least, most)
    least, most = counts[0], counts[-1]
    started = start_ray(num_cpus=None if os.environ.get("RAY_ADDRESS") else max(most, os.cpu_count() or 1))
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    gpus = gpus_of_each(gpus_per_worker, reachable_resources())
    use_gpu = gpus > 0
    if 0 < gpus < 1 and most > 1:
        raise UserError(
            f"--gpus-per-worker {gpus:g} has several workers share a GPU, which NCCL refuses; use one GPU for each "
            "worker and fewer workers, or --gpus-per-worker 0"
        )
    cpus = cpus_per_worker or (1.0 if use_gpu else max(1.0, cpus_for_each(machine_cpus(), most)))
    await_room(least, cpus, gpus)
    there = machines()
    run_dir = storage.absolute(run_dir)
    relay = Relay()
    arguments = {
        "stage": stage,
        "preset": preset_to_dict(preset),
        "most_workers": most,
        "data": storage.absolute(data),
        "run_dir": run_dir,
        "bundle": storage.absolute(bundle) if bundle else None,
        "places": dict(places or {}),
        "profile": profile,
        "reporter_spec": reporter_spec,
        "engine": engine,
        "threads": max(1, int(cpus)),
        "device": "cuda" if use_gpu else "cpu",
        "channel": relay.channel,
        "is_terminal": relay.stream.isatty(),
    }
    _remove_error(run_dir)
    make_trainer: Any = TorchTrainer  # its annotations are those of the older Ray Train
    trainer = make_trainer(
        lambda: _worker(arguments),  # not as a config, which the dashboard shows: the tracking URI may hold a password
        torch_config=RayNetwork("nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=least if least == most else (least, most),
            elastic_resize_monitor_interval_s=resize_interval_s,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=stage,
            storage_path=storage.join(run_dir, "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(arguments["threads"])}},
        ),
    )
    try:
        with relay, scaling_among(counts):
            result = fit(trainer, relay, still_ours)
    except TrainingFailedError as error:
        if found := _read_error(run_dir):
            raise _raised(found) from error
        said = f"training {stage} failed on its workers {max_failures + 1} times: {_last_line(error)}"
        if lost := lost_machines(there, error):  # which stays away for longer than the attempts take
            raise Silent(f"{', '.join(lost)} was lost, and {said}") from error
        raise UserError(said) from error
    finally:
        if started:
            ray.shutdown()
    value = result.return_value or _read_error(run_dir) or {"error": "the workers returned nothing"}
    if "error" in value:
        raise _raised(value)
    if "stopped" in value:
        raise Stopped(value["stopped"])
    return TrainResult(**value)


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What every Ray worker runs. An error that a user can mend is returned, so that Ray does not try again."""
    if found := _read_error(arguments["run_dir"]):  # of an attempt before, whose other workers had to be ended
        return found
    import ray.train
    import torch.distributed as dist

    from orchestration.evaluation.early import make_quality

    stream = RelayStream(arguments["channel"], arguments["is_terminal"])
    log = logging.getLogger("latentzoom")
    log.handlers, log.propagate = [stream.logging_handler()], False
    log.setLevel(logging.INFO)
    torch.set_num_threads(arguments["threads"])
    preset = preset_from_dict(arguments["preset"])
    num_workers = ray.train.get_context().get_world_size()
    try:
        result = train(
            arguments["stage"],
            with_equal_memory(preset, arguments["stage"], num_workers, arguments["most_workers"]),
            data=arguments["data"],
            run_dir=arguments["run_dir"],
            bundle=arguments["bundle"],
            reporters=_reporters(arguments["stage"], arguments["reporter_spec"]),
            use_deepspeed=arguments["engine"] == "deepspeed",
            device=arguments["device"],
            stop_requested=lambda: _stop_asked(stream),
            progress_stream=cast(TextIO, stream),
            places=arguments["places"],
            profile=arguments["profile"],
            make_quality=make_quality,
        )
    except Stopped as notice:
        return {"stopped": str(notice)}
    except UserError as error:
        found = {"error": clean(str(error)), "is_outage": is_outage(error)}
        with contextlib.suppress(UserError, OSError):  # it may be the store itself that does not answer
            if first := _read_error(arguments["run_dir"]):
                found = first
            else:
                storage.write_json(_error_url(arguments["run_dir"]), found)
        with contextlib.suppress(Exception):
            dist.destroy_process_group()  # wakes workers that wait for this one
        return found
    except Exception:
        if found := _read_error(arguments["run_dir"]):
            return found
        raise
    return dataclasses.asdict(result)


def _reporters(stage: str, spec: dict[str, Any] | None) -> list[Callable[[], Reporter]]:
    from orchestration.cluster.ray_metrics import RayMetricsReporter

    exported = [lambda: RayMetricsReporter(stage)]
    if spec is None:
        return [*exported]

    def make() -> Reporter:
        from orchestration.tracking.mlflow_reporter import MlflowReporter

        return MlflowReporter(**spec)

    return [*exported, make]


def _stop_asked(stream: RelayStream) -> Stop:
    """What this worker is asked to do: by whoever started the run, or by Ray when some worker's machine is to be taken
    away. All workers must ask together."""
    import ray.train

    notice = ray.train.get_preemption_info()  # waits for the others, so nobody may leave before
    if stream.was_asked_to_stop():
        return Stop.LEAVE
    return Stop.SAVE if notice is not None else Stop.NO


def with_equal_memory(preset: Preset, stage: str, num_workers: int, most: int) -> Preset:
    """An elastic run that has shrunk holds no more samples at once on each worker than at its full number `most`: the
    larger shares are split into micro-batches. A preset's own micro_batch is left as it is."""
    config = preset.stage(stage)
    if config.micro_batch or num_workers == most:
        return preset
    share, limit = config.global_batch // num_workers, config.global_batch // most
    micro = max(size for size in range(1, limit + 1) if share % size == 0)
    return override(preset, [f"{stage}.micro_batch={micro}"])


def _error_url(run_dir: str) -> str:
    return storage.join(run_dir, "error.json")


def _read_error(run_dir: str) -> dict[str, Any]:
    """What the first worker said that met an error: `error`, one line, and `is_outage`. Empty where none did."""
    url = _error_url(run_dir)
    return dict(storage.read_json(url)) if storage.exists(url) else {}


def _raised(found: Mapping[str, Any]) -> UserError:
    """An error of the workers as one of this process; an outage passes, on whichever worker it was met."""
    return (Silent if found.get("is_outage") else UserError)(found["error"])


def _remove_error(run_dir: str) -> None:
    if storage.exists(_error_url(run_dir)):
        fs, path = storage.filesystem(_error_url(run_dir))
        fs.rm_file(path)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
