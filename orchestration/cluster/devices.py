"""Which device computes: this process's own, or those of Ray workers, which are decided where the workers run."""

from __future__ import annotations

from pipeline.errors import UserError


def own_device(asked: str) -> str:
    """The device of this process: what was asked for, else CUDA where there is one."""
    import torch

    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def check_workers(option: str, num: int) -> None:
    """`UserError` for a number of Ray workers, 0 for none, that cannot be."""
    if num < 0:
        raise UserError(f"{option} {num} is not allowed; use 0 for this process, or a number of Ray workers")


def worker_gpus(device: str, gpus_per_worker: float | None) -> float | None:
    """GPUs of each Ray worker from `--device` and `--gpus-per-worker`. None, where neither is given: one where the
    cluster has GPUs. Raises `UserError` where the two contradict, or for a number below 0."""
    if gpus_per_worker is not None and not gpus_per_worker >= 0:
        raise UserError(f"--gpus-per-worker {gpus_per_worker:g} is not allowed; use 0 for CPUs, or a number of GPUs")
    if not device:
        return gpus_per_worker
    on_gpus = device.startswith("cuda")
    if gpus_per_worker is not None and (gpus_per_worker > 0) != on_gpus:
        raise UserError(f"--device {device} and --gpus-per-worker {gpus_per_worker:g} contradict; leave one out")
    return (1.0 if on_gpus else 0.0) if gpus_per_worker is None else gpus_per_worker
