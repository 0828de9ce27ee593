"""A cluster that is just starting: training waits for the machines that its autoscaler starts, and only for those."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ray_head import ray_head
from small_shards import make_shards

ROOT = Path(__file__).resolve().parents[2]
PATIENT = "from orchestration.cluster import cluster_size; cluster_size.PATIENCE_S = 20.0; "
MAIN = "import sys; from orchestration.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_training_waits_for_machines_that_may_still_start(tmp_path):
    """A head that runs no work, and Ray's autoscaler with room for one machine of two CPUs."""
    words = ["train", "autoencoder", "--preset", "debug", "--data", make_shards(tmp_path), "--engine", "ddp"]
    words += ["--gpus-per-worker", "0", "--set", "autoencoder.steps=2"]
    with ray_head(0, grows_by={"CPU": 2, "object_store_memory": 80_000_000}) as head:
        environment = {**head.environment, "RAY_ADDRESS": head.gcs, "PYTHONPATH": str(ROOT)}

        def train(run_dir: str, workers: int) -> subprocess.CompletedProcess[str]:
            more = ["--run-dir", str(tmp_path / run_dir), "--workers", str(workers)]
            command = [sys.executable, "-c", PATIENT + MAIN, *words, *more]
            return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

        done = train("run", 2)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-3000:]}"
        assert "waiting for the autoscaler: 2 CPU needed, 0 CPU there" in done.stderr
        # One machine is all that it may start. Nothing is about to come then, so the wait ends with what is wrong.
        done = train("more", 4)
        assert done.returncode == 2 and "4 workers with 1 CPU each need 4 CPU, and Ray has 2" in done.stderr
    assert (tmp_path / "run/bundle").is_dir()
