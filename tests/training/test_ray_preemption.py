"""A machine that is about to be taken away: Ray's notice leads to a checkpoint while the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_inputs import Shop

from orchestration.cluster.ray_train import launch, start_ray
from pipeline.errors import Stopped
from training.config import override

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def test_notice_that_a_node_goes_leads_to_a_checkpoint(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one CPU. Without the notice no checkpoint would be written before the last of a million steps."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    node = subprocess.Popen(
        _ray("start", f"--address={cluster.address}", "--num-cpus=1", "--block"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run_dir = tmp_path / "run"
    written: list[Path] = []
    went_wrong: list[BaseException] = []
    is_over = threading.Event()

    def scenario() -> None:
        try:
            events()
        except BaseException as error:
            went_wrong.append(error)
        finally:  # a run whose machine goes waits for another one, however long, and hears who asks it to end
            node.kill()
            with contextlib.suppress(AssertionError):
                _wait_until(lambda: is_over.is_set() or not _is_alive("RayTrainWorker"), "the end of the workers", 60)
            if not is_over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    def events() -> None:
        # Ray's watcher is an actor that starts beside the workers; a notice that comes before it would be lost.
        _wait_until(lambda: _last_step(run_dir) >= 3, "the first steps")
        _wait_until(lambda: _is_alive("PreemptionWatcher"), "Ray's preemption watcher")
        assert not list((run_dir / "checkpoints").glob("step-*"))
        _give_notice(cluster.address)
        _wait_until(lambda: list((run_dir / "checkpoints").glob("step-*/manifest.json")), "the checkpoint")
        written.extend((run_dir / "checkpoints").glob("step-*/manifest.json"))
        step = _last_step(run_dir)
        _wait_until(lambda: _last_step(run_dir) > step, "another step")  # the machine may be there for a while yet

    director = threading.Thread(target=scenario, daemon=True)
    try:
        start_ray()
        _wait_until(lambda: ray.cluster_resources().get("CPU", 0) >= 2, "the second node")
        director.start()
        settings = ["denoiser.steps=1000000", "denoiser.checkpoint_every=1000000"]
        with pytest.raises(Stopped, match="while it waited for workers"):
            launch(
                "denoiser", override(shop.preset, settings), data=shop.data, run_dir=str(run_dir), bundle=shop.bundle,
                num_workers=2, cpus_per_worker=1,
            )  # fmt: skip
        assert "ray-train" not in [thread.name for thread in threading.enumerate()]
    finally:
        is_over.set()
        ray.shutdown()
        node.kill()
        node.wait()
        cluster.shutdown()
    for error in went_wrong:
        raise error
    (manifest,) = written
    saved = json.loads(manifest.read_text())
    assert saved["world_size"] == 2 and 3 <= saved["step"] < 1_000_000


def _ray(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *words]


def _is_alive(name: str) -> bool:
    from ray._private.state import actors

    return any(a["ActorClassName"] == name and a["State"] == "ALIVE" for a in actors().values())


def _give_notice(address: str) -> None:
    """Tell Ray that the node which is not the head will be gone in an hour."""
    (other,) = (n["NodeID"] for n in ray.nodes() if n["Alive"] and "node:__internal_head__" not in n["Resources"])
    words = _ray("drain-node", f"--address={address}", f"--node-id={other}", "--reason=DRAIN_NODE_REASON_PREEMPTION")
    words += ["--reason-message=spot", "--deadline-remaining-seconds=3600"]
    subprocess.run(words, check=True, capture_output=True)


def _last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []  # the last one may be half written
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _wait_until(condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
