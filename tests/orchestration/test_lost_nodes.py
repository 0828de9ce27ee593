"""A machine lost in the middle of a job: three real nodes, the head without CPUs, jobs through the HTTP API."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from ray_head import Head, kill_tree, ray_head, ray_node
from small_pictures import make_pictures
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.cluster import jobs
from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from training.evaluation.report import load_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTZOOM_CACHE", str(tmp_path_factory.mktemp("head")))
        patch.setenv("RAY_health_check_period_ms", "1000")  # a dead node is noticed in seconds
        with ray_head(num_cpus=0) as head:  # all work goes to the other nodes
            yield head


@pytest.fixture
def nodes(head: Head, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    own = {"LATENTZOOM_CACHE": str(tmp_path / "cache")}
    with ray_node(head, environment=own) as one, ray_node(head, environment=own) as two:
        yield [one, two]


@pytest.fixture
def pictures(tmp_path):
    return str(make_pictures(tmp_path / "pictures", 48, cells=6, side=80))


def run_and_lose(
    head: Head, nodes: list[subprocess.Popen], words: list[str], task: str, has_begun: Callable[[], bool]
) -> int:
    """Submit a job, kill a node that is at `task` once something is finished, follow the job → its exit status."""
    assert main(["submit", *words, "--address", head.address, "--detach", "--submission-id", words[0]]) == 0
    client = jobs.connect(head.address)
    while not (has_begun() and (busy := [node for node in nodes if is_at(node, task)])):
        assert not client.get_job_status(words[0]).is_terminal(), client.get_job_logs(words[0])
        time.sleep(0.01)
    kill_tree(busy[0])
    return main(["jobs", words[0], "--follow", "--address", head.address])


def is_at(node: subprocess.Popen, task: str) -> bool:
    """Whether a worker of the node is at a task; Ray names its processes after what they do."""
    for process in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if process.cmdline()[0].startswith(f"ray::{task}"):
                return True
    return False


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_node_lost_in_preprocessing_costs_nothing_but_time(head, nodes, pictures, tmp_path, capfd):
    bundle, lost = make_bundle(tmp_path / "bundle"), tmp_path / "lost"
    options = ["--size", "64", "--crops-per-image", "12", "--crop-fraction", "0.5", "1", "--samples-per-shard", "24"]
    options += ["--batch-size", "4", "--autoencoder", bundle, "--encode-threads", "1"]
    words = ["preprocess", "folder", pictures, str(lost), *options, "--workers", "2"]
    assert run_and_lose(head, nodes, words, "ShardActor.work", lambda: any(lost.glob("shard-*.json"))) == 0
    output = capfd.readouterr().out
    lost_workers = re.search(r"(\d) workers? lost", output)  # a successor may be sent to the dead node and be lost too
    assert lost_workers and 1 <= int(lost_workers[1]) <= 2 and "died; redoing shard-" in output
    assert main(["preprocess", "folder", pictures, str(tmp_path / "whole"), *options]) == 0
    assert tree(lost) == tree(tmp_path / "whole")
    assert main(["preprocess", "verify", str(lost)]) == 0


def test_a_node_lost_in_evaluation_changes_no_figure(head, nodes, pictures, tmp_path, capfd):
    bundle, out = make_bundle(tmp_path / "bundle", task="sr"), tmp_path / "out"
    uri = tracking.tracking_uri(None, tmp_path / "store")
    registry.register(bundle, "tiny", tracking_uri=uri)
    options = ["--task", "sr", "--scales", "4", "--steps", "2", "--chunk-size", "1", "--num", "16"]
    words = ["evaluate", "--model", "models:/tiny@candidate", "--tracking-uri", uri, "--data", pictures, *options]
    lost = [*words, "--out", str(out), "--workers", "2"]
    assert run_and_lose(head, nodes, lost, "ChunkActor.work", lambda: any(out.glob("chunks/*/*.npz"))) == 0
    assert " died; redoing samples " in capfd.readouterr().out
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    torch.set_num_threads(threads)
    found, expected = load_report(str(out / "report.json")), load_report(str(tmp_path / "whole/report.json"))
    assert found.figures == expected.figures and found.num == 16
    assert (tmp_path / "cache/bundles" / found.bundle_digest).is_dir()  # fetched by the workers' machines themselves
