"""`infra/values.yaml` as typed, checked values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import from_dict
from pipeline.errors import UserError

HEADER = "# Generated from infra/values.yaml by `latentzoom manifests`. Edit that file, not this one.\n"


@dataclass(frozen=True, kw_only=True)
class ImageValues:
    repository: str
    tag: str
    cuda: str
    torch: str
    torch_index: str
    user: int

    @property
    def name(self) -> str:
        return f"{self.repository}:{self.tag}"


@dataclass(frozen=True, kw_only=True)
class HeadValues:
    cpus: int
    memory_gib: int


@dataclass(frozen=True, kw_only=True)
class ClusterValues:
    namespace: str
    ray_version: str
    idle_seconds: int
    shm_gib: int
    grace_seconds: int
    head: HeadValues


@dataclass(frozen=True, kw_only=True)
class WorkerValues:
    """One group of workers. spot: they may be taken away at any moment, and cost less."""

    min: int
    max: int
    cpus: int
    memory_gib: int
    gpus: int
    spot: bool
    node_selector: Any

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max:
            raise UserError(f"values: workers from {self.min} to {self.max} is not allowed; use 0 <= min <= max")


@dataclass(frozen=True, kw_only=True)
class JobValues:
    preset: str
    source: str
    source_url: str
    workdir: str
    model_name: str
    preprocess_workers: int
    evaluate_workers: int
    settings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrackingValues:
    mlflow: str
    psycopg2: str
    boto3: str
    python_image: str
    postgres_image: str
    s3_image: str
    bucket: str
    mlflow_port: int
    s3_port: int
    tracking_uri: str
    s3_endpoint: str


@dataclass(frozen=True, kw_only=True)
class RayUpValues:
    """packages: what Ray's launcher on the head needs beyond the lock to start machines, with versions."""

    packages: tuple[str, ...]
    region: str
    head_type: str
    cpu_type: str
    gpu_type: str
    ssh_user: str


@dataclass(frozen=True, kw_only=True)
class AlertValues:
    min_images_per_s: float
    max_data_wait_percent: float
    minutes: int


@dataclass(frozen=True, kw_only=True)
class Values:
    """Everything that `infra/values.yaml` decides."""

    name: str
    image: ImageValues
    cluster: ClusterValues
    cpu_workers: WorkerValues
    gpu_workers: WorkerValues
    job: JobValues
    tracking: TrackingValues
    ray_up: RayUpValues
    alerts: AlertValues

    def __post_init__(self) -> None:
        if self.gpu_workers.min < 1:
            raise UserError("values: gpu_workers.min must be at least 1, the fewest workers that train")

    def job_command(self) -> list[str]:
        """The command of the RayJob; its worker range is that of the GPU workers."""
        job, gpu = self.job, self.gpu_workers
        command = ["latentzoom", "pipeline", "--preset", job.preset, "--source", job.source]
        command += ["--source-url", job.source_url, "--workdir", job.workdir, "--name", job.model_name]
        command += ["--workers", f"{gpu.min}:{gpu.max}", "--gpus-per-worker", str(gpu.gpus)]
        command += ["--preprocess-workers", str(job.preprocess_workers)]
        command += ["--evaluate-workers", str(job.evaluate_workers)]
        return [*command, *(word for setting in job.settings for word in ("--set", setting))]


def load_values(path: Path) -> Values:
    """Read and check a values file. Unknown and missing names are a `UserError`."""
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    values = from_dict(Values, raw, path.name)
    check_batches(values)
    return values


def check_batches(values: Values) -> None:
    """Every worker count of the elastic range must divide every stage's global batch."""
    from training.config import override
    from training.presets import get_preset

    preset = override(get_preset(values.job.preset), list(values.job.settings))
    for stage in preset.stages:
        batch = preset.stage(stage).global_batch
        for num in range(values.gpu_workers.min, values.gpu_workers.max + 1):
            if batch % num:
                raise UserError(
                    f"values: {stage}.global_batch = {batch} cannot be shared by {num} workers; "
                    f"set one that all of {values.gpu_workers.min}..{values.gpu_workers.max} divide"
                )
