"""A Ray of one command's own: what Ray starts listens on the loopback, also while two workers train."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray_head import kill_tree
from small_shards import make_shards

from preprocess.local_ray import loopback_only


def listeners(pid: int) -> dict[str, set[str]]:
    """Addresses on which a process and its children listen, by process name."""
    found: dict[str, set[str]] = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            name, sockets = process.name(), process.net_connections(kind="tcp")
        except psutil.Error:  # it has just ended
            continue
        for each in sockets:
            if each.status == psutil.CONN_LISTEN:
                found.setdefault(name, set()).add(each.laddr.ip.removeprefix("::ffff:"))
    return found


def test_the_setting_lasts_for_the_block_only(monkeypatch):
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    monkeypatch.setenv(name, "1")
    with loopback_only():
        assert os.environ[name] == "0" and not ray_constants.ENABLE_RAY_CLUSTER
    assert os.environ[name] == "1" and ray_constants.ENABLE_RAY_CLUSTER


@pytest.mark.slow
def test_training_on_two_workers_of_this_machine_listens_on_the_loopback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-m", "orchestration.cli", "train", "autoencoder", "--preset", "debug"]
    command += ["--data", make_shards(tmp_path), "--run-dir", "run", "--workers", "2", "--gpus-per-worker", "0"]
    command += ["--set", "autoencoder.steps=100000", "--set", "autoencoder.log_every=1"]
    with open(tmp_path / "log", "wb") as log:
        training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not (Path("run/metrics.jsonl").is_file() and Path("run/metrics.jsonl").read_text()):
            assert training.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        found = listeners(training.pid)
    finally:
        kill_tree(training)
    workers = found.pop("ray::RayTrainWorker")  # torch's rendezvous, a port of rank 0, cannot be told where to listen
    assert "127.0.0.1" in workers and {"raylet", "gcs_server"} <= set(found)
    assert set().union(*found.values()) == {"127.0.0.1"}, found
