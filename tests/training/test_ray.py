"""Two gloo workers under Ray Train with DeepSpeed: the same training, whatever dies or changes on the way."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from stage_inputs import Shop

from orchestration.cluster.ray_train import launch, start_ray
from pipeline import storage
from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from training.config import override, preset_from_dict, preset_to_dict
from training.run import TrainResult, train

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
Run = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    start_ray(num_cpus=2)
    yield
    ray.shutdown()


def start(shop: Shop, run_dir: Path, *settings: str, num_workers: Any = 2, **options: Any) -> TrainResult:
    preset = override(shop.preset, [f"denoiser.{setting}" for setting in settings])
    return launch(
        "denoiser",
        preset,
        data=shop.data,
        run_dir=str(run_dir),
        bundle=shop.bundle,
        num_workers=num_workers,
        cpus_per_worker=1,
        **options,
    )


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}


def weights(run_dir: Path) -> str:
    return storage.sha256_file(str(run_dir / "bundle/denoiser.safetensors"))


def distance(first: str, second: str) -> float:
    """Largest difference between two bundles' denoisers."""
    a, b = load_bundle(first).denoiser, load_bundle(second).denoiser
    assert a is not None and b is not None
    return max(float((x - y).abs().max()) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def training_workers() -> list[psutil.Process]:
    """The training processes that this test's Ray started."""
    processes = psutil.Process().children(recursive=True)
    return [p for p in processes if any("RayTrainWorker" in word for word in _words(p))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


class Killer(threading.Thread):
    """Kills one training worker once the run has reported a step."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__(daemon=True)
        self.file, self.step, self.killed = run_dir / "metrics.jsonl", step, 0
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if self.file.exists() and f'"step": {self.step},' in self.file.read_text():
                training_workers()[-1].kill()
                self.killed += 1
                return
            time.sleep(0.02)


def _every_combination(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs on every worker: one short run for each ZeRO stage and precision."""
    torch.set_num_threads(1)
    runs = {
        f"{zero_stage}-{precision}": [f"decoder.zero_stage={zero_stage}", f"decoder.precision={precision}"]
        for zero_stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    }
    runs["channels-last"] = ["decoder.channels_last=true"]  # as the paper's presets have it
    results = {}
    for name, settings in runs.items():
        result = train(
            "decoder",
            override(preset_from_dict(arguments["preset"]), settings),
            data=arguments["data"],
            run_dir=f"{arguments['root']}/{name}",
            bundle=arguments["bundle"],
            use_deepspeed=True,
            device="cpu",
        )
        results[name] = result.last_loss
    return results


def test_every_zero_stage_and_precision_trains_the_same(
    shop: Shop, two_cpus: None, run_stage: Run, tmp_path: Path
) -> None:
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import RunConfig, ScalingConfig

    trainer: Any = TorchTrainer
    result = trainer(
        _every_combination,
        train_loop_config={
            "preset": preset_to_dict(shop.preset),
            "data": shop.data,
            "bundle": shop.bundle,
            "root": str(tmp_path),
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="combinations",
            storage_path=str(tmp_path / "ray"),
            worker_runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        ),
    ).fit()
    plain = run_stage("decoder", run_dir=tmp_path / "plain")
    state = load_bundle(plain.bundle).decoder
    assert state is not None
    # Its sums round differently, and Adam makes that visible where a gradient is nearly zero: compare the loss.
    assert result.return_value.pop("channels-last") == pytest.approx(plain.last_loss, rel=1e-5)
    for name, loss in result.return_value.items():
        precise = name.endswith("fp32")
        assert loss == pytest.approx(plain.last_loss, rel=1e-5 if precise else 2e-2), name
        other = load_bundle(str(tmp_path / name / "bundle")).decoder
        assert other is not None
        for a, b in zip(state.state_dict().values(), other.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if precise else 5e-3, msg=name)


def test_killed_worker_costs_nothing_but_time(shop: Shop, two_cpus: None, tmp_path: Path) -> None:
    settings = ["steps=30", "checkpoint_every=7", "zero_stage=2"]
    start(shop, tmp_path / "whole", *settings)
    killer = Killer(tmp_path / "killed", 17)
    result = start(shop, tmp_path / "killed", *settings)
    assert killer.killed == 1 and result.resumed_from in (7, 14)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_one_two_workers_continue_as_one_run(shop: Shop, two_cpus: None, tmp_path: Path, zero_stage: int) -> None:
    """Masters, moments and averages go through two re-splits; the sample order is that of an unchanged run."""
    zero = f"zero_stage={zero_stage}"
    whole = start(shop, tmp_path / "whole", zero, "steps=9")
    three = start(shop, tmp_path / "changed", zero, "steps=3")
    averages = weights(tmp_path / "changed")
    (tmp_path / "changed/result.json").unlink()
    again = start(shop, tmp_path / "changed", zero, "steps=3", num_workers=1)  # loads, and has nothing left to do
    assert again.resumed_from == three.steps and weights(tmp_path / "changed") == averages
    start(shop, tmp_path / "changed", zero, "steps=6", num_workers=1)
    last = start(shop, tmp_path / "changed", zero, "steps=9")
    assert last.resumed_from == 6 and last.sample_order == whole.sample_order
    before, after = losses(tmp_path / "whole"), losses(tmp_path / "changed")
    assert after.keys() == before.keys()
    assert all(after[step] == pytest.approx(before[step], rel=1e-5) for step in before)
    # Sums of two halves round differently from whole sums; without the moments the distance would be near lr · steps.
    assert distance(whole.bundle, last.bundle) < 1e-4


def test_a_run_that_was_taken_over_ends_and_leaves_no_thread_in_ray(shop: Shop, two_cpus: None, tmp_path: Path) -> None:
    """Ray crashes the process where it is shut down while a thread waits for it: such a thread may not be left."""
    metrics = tmp_path / "run/metrics.jsonl"

    def still_ours() -> None:
        if metrics.exists() and '"step": 2,' in metrics.read_text():
            raise UserError("the run was taken over")

    try:
        with pytest.raises(UserError, match="was taken over"):
            start(shop, tmp_path / "run", "steps=1000000", "checkpoint_every=1000000", still_ours=still_ours)
        assert "ray-train" not in [thread.name for thread in threading.enumerate()]
        deadline = time.monotonic() + 60
        while training_workers() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert training_workers() == [] and not list((tmp_path / "run/checkpoints").glob("step-*"))
    finally:  # a local Ray keeps what such a run had reserved; it ends with the command that ran it
        ray.shutdown()
        start_ray(num_cpus=2)


def test_tracking_server_that_is_down_stops_nothing(shop: Shop, two_cpus: None, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    spill = tmp_path / "spill.jsonl"
    spec = {"run_id": "0" * 32, "tracking_uri": uri, "spill": str(spill), "close_timeout": 2.0, "system_metrics": False}
    result = start(shop, tmp_path / "run", "steps=4", reporter_spec=spec)
    assert result.steps == 4
    assert '"loss"' in spill.read_text()  # kept, to be replayed


def test_user_errors_come_back_at_once_and_in_one_line(shop: Shop, two_cpus: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be shared by 3 workers"):
        start(shop, tmp_path / "run", num_workers=3)
    with pytest.raises(UserError, match="Ray has 2"):
        start(shop, tmp_path / "run", num_workers=4)
    with pytest.raises(UserError, match="micro_batch = 3") as caught:
        start(shop, tmp_path / "run", "micro_batch=3")
    assert "\n" not in str(caught.value)


def test_elastic_run_shrinks_with_the_cluster_and_grows_back(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one CPU on this machine; one goes, later another comes."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    run_dir, seen = tmp_path / "run", []
    nodes = [_join(cluster.address)]

    def scenario() -> None:
        _wait_for_workers(run_dir, 2)
        nodes[0].terminate()
        _wait_for_workers(run_dir, 1)
        nodes.append(_join(cluster.address))
        _wait_for_workers(run_dir, 2)
        seen.extend(sizes(run_dir))
        # All has been seen: use up the failures that the run may have. A worker that dies before it trains counts as
        # none of them, so each kill waits until the run has moved on.
        position = -1
        while not over.wait(0.5):
            if (run_dir / "metrics.jsonl").stat().st_size == position:
                continue
            for worker in training_workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
            position = (run_dir / "metrics.jsonl").stat().st_size

    over = threading.Event()
    director = threading.Thread(target=scenario, daemon=True)
    try:
        start_ray()
        deadline = time.monotonic() + 120
        while ray.cluster_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)  # the second node is still joining
        director.start()
        start(
            shop,
            run_dir,
            "steps=1000000",
            "checkpoint_every=10",
            num_workers=(1, 2),
            resize_interval_s=30.0,  # longer than a start takes, or it would be resized again and again
            max_failures=2,
        )
    except Exception as error:
        assert seen, error
    finally:
        over.set()
        ray.shutdown()
        for node in nodes:
            node.terminate()
            node.wait()
        cluster.shutdown()
    assert seen == [2, 1, 2]


def _join(address: str) -> subprocess.Popen[bytes]:
    """A node of one CPU that ends with its process."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=1", "--block"]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for_workers(run_dir: Path, num: int) -> None:
    """Until the newest checkpoint was written by `num` workers."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for manifest in sorted((run_dir / "checkpoints").glob("step-*/manifest.json"))[-1:]:  # older ones stay a while
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                if json.loads(manifest.read_text())["world_size"] == num:
                    return
        time.sleep(0.2)


def sizes(run_dir: Path) -> list[int]:
    """Numbers of workers in the order in which the run had them."""
    found: list[int] = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        num = int(json.loads(line)["workers"])
        if found[-1:] != [num]:
            found.append(num)
    return found
