"""The same job started twice at once, as real processes: one goes on; the other is refused, or does no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_pictures import make_pictures
from tiny_bundle import make_bundle

from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from preprocess.shards.verify import verify

pytestmark = pytest.mark.slow
PIXELS = ["--size", "16", "--samples-per-shard", "8", "--val-fraction", "0.2"]


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orchestration.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def second_while_first_stands(words: list[str], is_midway: Callable[[], bool]) -> tuple[int, str]:
    """Stop the first process midway, run a second to its end, let the first finish well → the second's exit status and
    error output."""
    first = start(*words)
    while not is_midway():
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)
    second = start(*words)
    _, error = second.communicate()
    first.send_signal(signal.SIGCONT)
    _, first_error = first.communicate()
    assert first.returncode == 0, first_error
    return second.returncode, error


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs go to the mlflow.db of the working folder


@pytest.fixture
def pictures(tmp_path):
    return str(make_pictures(tmp_path / "pictures", 160))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_preprocessing_twice_into_one_folder(pictures, tmp_path):
    shards = tmp_path / "shards"
    words = ["preprocess", "folder", pictures, str(shards), *PIXELS]
    status, error = second_while_first_stands(words, lambda: (shards / "shard-000000.json").exists())
    assert status == 2 and error == f"latentzoom: error: another run is writing to {shards}; wait for it, or choose " \
        "another folder\n"  # fmt: skip
    assert not verify(str(shards)).damage
    alone = tmp_path / "alone"
    assert start(*words[:3], str(alone), *PIXELS).wait() == 0
    assert content(shards) == content(alone)


def test_two_settings_race_for_one_folder_and_are_never_mixed(pictures, tmp_path):
    shards = tmp_path / "shards"
    both = [start("preprocess", "folder", pictures, str(shards), *PIXELS, "--seed", seed) for seed in "12"]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    refused = next(error for process, error in zip(both, errors) if process.returncode)
    assert "another run is writing" in refused or "seed was" in refused
    assert not verify(str(shards)).damage


def test_training_twice_in_one_run_folder(pictures, tmp_path):
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert start("preprocess", "folder", pictures, str(shards), *PIXELS, "--size", "32").wait() == 0
    words = ["train", "autoencoder", "--preset", "debug", "--data", str(shards), "--run-dir", str(run), "--local"]
    words += ["--threads", "1", "--set", "autoencoder.steps=40"]
    status, error = second_while_first_stands(words, lambda: (run / "metrics.jsonl").exists())
    assert status == 2 and error.splitlines()[-1].startswith(f"latentzoom: error: another training is running in {run}")
    registry.verify_bundle(run / "bundle")
    again = start(*words)
    output, _ = again.communicate()
    assert again.returncode == 0 and "40 steps" in output


def test_a_pipeline_twice_in_one_working_folder(pictures, tmp_path):
    work = tmp_path / "work"
    words = ["pipeline", "--preset", "debug", "--source", "folder", "--source-url", pictures, "--workdir", str(work)]
    words += ["--local", "--until", "pixels", "--preprocess=val_fraction=0.3", "--preprocess=samples_per_shard=8"]
    status, error = second_while_first_stands(words, lambda: any(work.glob("pixels/*/shard-000000.json")))
    assert status == 2 and error.splitlines()[-1].startswith(f"latentzoom: error: another job is running in {work}")
    assert not verify(str(next(work.glob("pixels/*")))).damage


PROGRAM = """
import sys
from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from pipeline.errors import UserError
import mlflow, mlflow.pyfunc
verb, uri, *rest = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
try:
    if verb == "register":
        print(registry.register(rest[0], "faces", tracking_uri=uri, report={REPORT}).version)
    else:
        print(registry.promote("faces", tracking_uri=uri, candidate=rest[0]).promote)
except UserError as error:
    print(f"latentzoom: error: {error}", file=sys.stderr)
    sys.exit(2)
"""
FIGURE = {"name": "lpips", "method": "ours", "setting": "x2", "low": 0.0, "high": 1.0, "protocol": "p", "num": 8,
          "resamples": [0.5, 0.4, 0.6]}  # fmt: skip
REPORT = {
    "task": "sr", "data": "/data/val", "data_digest": "d" * 64, "protocol_version": 1, "num": 8, "seed": 0,
    "sampler": "x", "figures": [{**FIGURE, "value": 0.5}, {**FIGURE, "name": "psnr_rgb", "value": 20.0}],
}  # fmt: skip


def at_once(*calls: list[str]) -> list[tuple[int, str, str]]:
    """Run registry calls in processes that begin at the same moment → (exit status, output, error output) of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    program = PROGRAM.replace("{REPORT}", repr(REPORT))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *call], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment,
        ) for call in calls
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs)]


def test_registering_and_promoting_at_once_in_a_new_registry(tmp_path, cache):
    uri = tracking.tracking_uri(None, tmp_path / "store")
    bundles = [make_bundle(tmp_path / f"b{seed}", seed=seed) for seed in (1, 2)]
    digests = {registry.bundle_digest(bundle) for bundle in bundles}
    results = at_once(*(["register", uri, bundle] for bundle in bundles))
    assert [status for status, _, _ in results] == [0, 0], results
    assert sorted(output.split()[-1] for _, output, _ in results) == ["1", "2"]
    found = {registry.bundle_digest(registry.resolve(f"models:/faces/{n}", tracking_uri=uri)) for n in "12"}
    assert found == digests
    candidate = registry.get_version("faces", "candidate", tracking_uri=uri)
    assert candidate is not None and candidate.version in "12"

    results = at_once(*(["promote", uri, n] for n in "12"))
    won = [n for n, (status, output, _) in zip("12", results) if status == 0 and output.split()[-1] == "True"]
    assert len(won) == 1, results  # and the other was judged before it, or after it, by figures that are the same
    status, output, error = results["21".index(won[0])]
    assert (status, output.split()[-1:]) == (0, ["False"]) or (status == 2 and "changed while it was being" in error)
    tags = {n: registry.require_version("faces", n, uri).tags for n in "12"}
    assert [n for n in "12" if "latentzoom.previous_champion" in tags[n]] == won
    assert registry.require_version("faces", "champion", uri).version == won[0]
    registry.resolve("models:/faces@champion", tracking_uri=uri)
