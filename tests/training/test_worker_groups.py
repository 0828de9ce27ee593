"""Where and by how many workers a stage is trained: one decision for Ray, DeepSpeed and torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch

from orchestration.cluster import ray_train
from orchestration.cluster.cluster_size import gpus_of_each
from orchestration.cluster.elastic import scaling_among, worker_counts
from pipeline.errors import UserError
from training.config import StageConfig
from training.ema import Ema
from training.engine_deepspeed import DeepSpeedEngine
from training.power_ema import PowerAverages
from training.presets import debug
from training.world import World, current_world


@pytest.mark.parametrize(
    ("batch", "micro", "least", "most", "expected"),
    [(96, 0, 4, 8, (4, 6, 8)), (96, 8, 1, 8, (1, 2, 3, 4, 6)), (7, 0, 7, 7, (7,)), (12, 0, 5, 7, (6,))],
)
def test_elastic_runs_have_the_numbers_of_workers_that_divide(
    batch: int, micro: int, least: int, most: int, expected: tuple[int, ...]
) -> None:
    assert worker_counts(StageConfig(global_batch=batch, micro_batch=micro), least, most) == expected


def test_a_range_without_any_such_number_is_refused_in_one_line() -> None:
    with pytest.raises(
        UserError, match="global_batch = 96 cannot be shared by 7 workers; use a multiple of 7"
    ) as error:
        worker_counts(StageConfig(global_batch=96), 7, 7)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("there", "expected"), [(3, 0), (4, 4), (5, 4), (7, 6), (8, 8), (20, 8)])
def test_ray_takes_the_next_smaller_allowed_number(there: int, expected: int) -> None:
    """Through Ray Train's own policy for elastic runs, as its controller gets it: pickled."""
    pytest.importorskip("ray")
    from ray.train.v2.api import data_parallel_trainer as trainer
    from ray.train.v2.api.config import ScalingConfig

    original = trainer.create_scaling_policy
    with scaling_among((4, 6, 8)):
        policy = trainer.create_scaling_policy(ScalingConfig(num_workers=(4, 8), resources_per_worker={"CPU": 2}))
        fixed = trainer.create_scaling_policy(ScalingConfig(num_workers=4))
    assert trainer.create_scaling_policy is original and type(fixed).__name__ == "FixedScalingPolicy"
    policy = cloudpickle.loads(cloudpickle.dumps(policy))
    machines = {f"node {i}": {"CPU": 3.0} for i in range(there)}
    assert policy._count_possible_workers(machines) == expected


@pytest.mark.parametrize(
    ("asked", "there", "expected"), [(None, 0, 0.0), (None, 8, 1.0), (0.0, 8, 0.0), (0.5, 8, 0.5), (2.0, 0, 2.0)]
)
def test_workers_have_a_gpu_each_where_there_are_any(asked: float | None, there: int, expected: float) -> None:
    assert gpus_of_each(asked, {"CPU": 16.0, **({"GPU": float(there)} if there else {})}) == expected


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray says of a cluster."""
    ray = pytest.importorskip("ray")
    there = {"CPU": 16.0, "GPU": 8.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": "a", "NodeManagerAddress": "h", "Alive": True, "Resources": there}]
    )
    monkeypatch.setattr(ray_train, "start_ray", lambda **_: False)


def launched(tmp_path: Path, **options: Any) -> Any:
    return ray_train.launch("denoiser", debug(), data="data", run_dir=str(tmp_path), **options)


def test_workers_may_not_share_a_gpu(eight_gpus: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--gpus-per-worker 0.5 has several workers share a GPU") as error:
        launched(tmp_path, num_workers=2, gpus_per_worker=0.5)
    assert "\n" not in str(error.value)


def test_one_decision_of_the_device(eight_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing said, GPUs in the cluster: one for each worker, NCCL between them, and training told so. And a user's
    error is what is said in the end, though the other workers had to be killed, and no worker tries again."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    seen: list[Any] = []

    def fit(trainer: Any, *_: object) -> Any:
        seen.append(trainer)
        (tmp_path / "error.json").write_text('{"error": "no room in /data"}')
        raise WorkerGroupError("rank 3 died", {})

    monkeypatch.setattr(ray_train, "fit", fit)
    with pytest.raises(UserError, match="^no room in /data$"):
        launched(tmp_path, num_workers=4)
    [trainer] = seen
    assert trainer.scaling_config.resources_per_worker == {"CPU": 1.0, "GPU": 1.0} and trainer.scaling_config.use_gpu
    assert trainer.backend_config.backend == "nccl"
    assert ray_train._worker({"run_dir": str(tmp_path)}) == {"error": "no room in /data"}
    monkeypatch.setattr(ray_train, "_worker", lambda arguments: arguments)
    assert trainer.train_loop_per_worker()["device"] == "cuda"


def test_a_gpu_that_is_not_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="this process sees no CUDA device; train on the CPU"):
        current_world("cuda")


def test_a_step_that_deepspeed_left_out_has_a_norm_on_the_device_too() -> None:
    """Its number among tensors of a GPU could not be stacked with them. ("meta": a device that is not the CPU.)"""

    class Wrapped:
        optimizer = SimpleNamespace(param_groups=[])
        norm: Any = float("inf")

        def step(self) -> None: ...

        def get_global_grad_norm(self) -> Any:
            return self.norm

    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.config, engine.world = StageConfig(), World(0, 1, 0, torch.device("meta"))
    engine._engine, engine._fragments, engine._snapshot, engine.ema = Wrapped(), [], None, Ema([])
    engine.power = PowerAverages([], engine.config)
    norms = [engine.step(1, 0.1)]
    Wrapped.norm = torch.ones((), device="meta")
    norms.append(engine.step(2, 0.1))
    assert torch.stack(norms).device.type == "meta"


@pytest.mark.parametrize("set_before", [False, True])
def test_deepspeed_works_on_the_device_that_was_decided(set_before: bool) -> None:
    """On a machine with GPUs too, where it would move the network there by itself."""
    pytest.importorskip("deepspeed")
    program = f"""
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 8
if {set_before}:
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    set_accelerator(CUDA_Accelerator())
    torch.cuda.current_device = lambda: 0
from training.engine_deepspeed import _import_deepspeed
_import_deepspeed(torch.device("cpu"))
from deepspeed.accelerator import get_accelerator
print("device", get_accelerator().device_name())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if set_before:
        assert "DeepSpeed was set up for cuda in this process, and training is to run on cpu" in done.stderr
    else:
        assert "device cpu" in done.stdout, done.stderr
