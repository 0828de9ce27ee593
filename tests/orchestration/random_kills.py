"""Pipelines submitted to a `netted_cluster` while its machines die and its links are cut, by a seed; all must end with
the same content of store and registry.

    python tests/orchestration/random_kills.py --seed 1 --kills 20 --pipelines 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from netted_cluster import Cluster, netted_cluster
from network import Machine
from small_pictures import make_pictures

from orchestration import jobs, registry, tracking
from pipeline.errors import UserError

FAULTS = (
    *(("kill", name) for name in ("head", "worker-1", "worker-2", "store", "tracker")),
    *(("cut", name) for name in ("head", "worker-1", "worker-2", "store", "tracker")),
)
STEPS = ["pixels", "autoencoder", "latents", "decoder", "denoiser", "align", "evaluate", "register", "promote"]
_BEGUN = re.compile(r"step \d+/\d+ (\w+): (?!done before)")
_HELD = re.compile(r"its hold ends in (\d+) s|another job took")


@dataclass(frozen=True)
class Fault:
    """what happens to which machine, a fraction of its usual time after a step began, and for how many seconds."""

    step: str
    fraction: float
    what: str
    machine: str
    lasts: float

    def __str__(self) -> str:
        return f"{self.what} {self.machine} for {self.lasts:.0f} s, at {self.fraction:.0%} of {self.step}"


def draw(dice: random.Random, steps: list[str], num: int) -> list[Fault]:
    """`num` faults in the order of the steps."""
    found = []
    for _ in range(num):
        what, machine = dice.choice(FAULTS)
        found.append(Fault(dice.choice(steps), dice.uniform(0, 0.9), what, machine, dice.uniform(2, 20)))
    return sorted(found, key=lambda fault: (steps.index(fault.step), fault.fraction))


@contextlib.contextmanager
def faulty(machine: Machine, what: str) -> Iterator[None]:
    machine.kill() if what == "kill" else machine.cut()
    try:
        yield
    finally:
        machine.revive() if what == "kill" else machine.join()


@dataclass
class Outcome:
    """seconds: of each step. submissions: how often the command was given, less those that were told to wait."""

    name: str
    seconds: dict[str, float]
    submissions: int
    log: str


def words(name: str) -> list[str]:
    return [
        "pipeline", "--preset", "debug", "--source", "folder", "--source-url", "s3://bucket/pictures",
        "--workdir", f"s3://bucket/{name}", "--name", name, "--workers", "2", "--gpus-per-worker", "0",
        "--preprocess-workers", "2", "--preprocess=val_fraction=0.3", "--preprocess=samples_per_shard=8",
        "--preprocess=encode_threads=1", "--evaluate=num=8", "--evaluate=num_steps=2", "--evaluate=sizes=[16,32]",
        "--evaluate=chunk_size=2",
    ]  # fmt: skip


def play(cluster: Cluster, name: str, faults: list[Fault], usual: dict[str, float], within_s: float) -> Outcome:
    """Submit the pipeline, let the faults happen, and submit again whenever the job is gone or has failed → how it
    ended. `AssertionError` when it does not end well in time."""
    end, todo, submissions, log = time.monotonic() + within_s, list(faults), 1, ""
    begun: dict[str, float] = {}
    job = submit(cluster, name)
    while (state := job_state(cluster, job)) != "SUCCEEDED":
        assert time.monotonic() < end, f"{name} did not end in {within_s:.0f} s:\n{log[-3000:]}"
        log = cluster.job_log(job) or log
        for step in _BEGUN.findall(log):
            begun.setdefault(step, time.monotonic())
        if todo and todo[0].step in begun:
            fault = todo[0]
            if time.monotonic() >= begun[fault.step] + fault.fraction * usual.get(fault.step, 0):
                print(f"{time.strftime('%H:%M:%S')} {name}: {fault}", flush=True)
                todo.pop(0)
                with faulty(cluster.net.machines[fault.machine], fault.what):
                    time.sleep(fault.lasts)
                continue
        if state in ("FAILED", "STOPPED", "UNKNOWN"):
            last = log.strip().splitlines()[-1:]
            print(f"{time.strftime('%H:%M:%S')} {name}: {job} {state}: {last}", flush=True)
            if held := _HELD.search(str(last)):
                time.sleep(int(held[1] or 5) + 1)
            else:
                submissions += 1
            cluster.await_nodes()
            job = submit(cluster, name)
        time.sleep(1)
    for fault in todo:
        print(f"{name}: ended before: {fault}", flush=True)
    return Outcome(name, seconds_of(cluster, name), submissions, log)


def submit(cluster: Cluster, name: str) -> str:
    """Give the command, as a person would: again where the head does not answer yet."""
    job = f"{name}-{time.monotonic():.0f}"
    for _ in range(60):
        if cluster.submit(words(name), job) == 0:
            return job
        time.sleep(2)
    raise AssertionError(f"{name} cannot be submitted")


def seconds_of(cluster: Cluster, name: str) -> dict[str, float]:
    """How long each step took, in the order of the steps."""
    found = {key: json.loads(data) for key, data in cluster.objects(f"{name}/steps/").items()}
    steps = {key.removesuffix(".json"): each["result"]["seconds"] for key, each in found.items() if "result" in each}
    return {step: steps[step] for step in STEPS}


def job_state(cluster: Cluster, job: str) -> str:
    """As the head says; UNKNOWN where it knows no such job, "" where it does not answer."""
    try:
        return jobs.connect(cluster.address).get_job_status(job).value
    except RuntimeError as error:
        return "UNKNOWN" if "404" in str(error) else ""
    except (UserError, OSError):
        return ""


def content(cluster: Cluster, name: str) -> dict[str, Any]:
    """What must not depend on the faults: shards, the bundle, figures, and what the registry says."""
    uri, client = cluster.tracking_uri, tracking.client(cluster.tracking_uri)
    found = client.search_model_versions(f"name = '{name}'")
    names = [model.name for model in client.search_registered_models() if model.name.startswith(name)]
    champion = registry.require_version(name, registry.CHAMPION, uri)
    report = registry.stored_report(champion, tracking_uri=uri)
    assert report is not None
    registry.resolve(champion.uri, tracking_uri=uri)  # it is there, whole
    objects = cluster.objects(f"{name}/")
    shards = {key: data for key, data in objects.items() if key.startswith(("pixels/", "latents/"))}
    bundles = {key: data for key, data in objects.items() if "/bundle/" in key}
    runs = client.search_runs([tracking.experiment_id(uri)], max_results=1000)
    parent = next(run.info.run_id for run in runs if run.info.run_name.startswith(f"pipeline {name} "))
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    return {
        "runs": sorted((run.info.run_name, run.info.status) for run in children),
        "models": [model.removeprefix(name) for model in names],
        "versions": [(v.version, sorted(client.get_model_version(name, v.version).aliases)) for v in found],
        "champion": (champion.version, champion.tags["latentzoom.bundle_digest"]),
        "promotion": sorted(key for key in champion.tags if "champion" in key or "promotion" in key),
        "figures": report["figures"],
        "shards": shards,
        "bundles": bundles,
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    found = []
    for key in one:
        if one[key] != other[key] and isinstance(one[key], dict):
            names = [n for n in one[key].keys() | other[key].keys() if one[key].get(n) != other[key].get(n)]
            found.append(f"{key}: {', '.join(sorted(names))}")
        elif one[key] != other[key]:
            found.append(f"{key}: {one[key]!r:.300} became {other[key]!r:.300}")
    return found


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Cluster]:
    """A cluster with pictures in its store, and an environment in which this process is its client."""
    with netted_cluster() as cluster, pytest.MonkeyPatch.context() as patch:
        for variable, value in cluster.environment.items():
            if variable.startswith(("AWS", "MLFLOW")):
                patch.setenv(variable, value)
        patch.setenv("RAY_AUTH_TOKEN", cluster.token)
        patch.setenv("LATENTZOOM_CACHE", str(folder / "cache"))
        for path in make_pictures(folder / "pictures", 48).iterdir():
            cluster.s3().put_object(Bucket="bucket", Key=f"pictures/{path.name}", Body=path.read_bytes())
        yield cluster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pipelines", type=int, default=5)
    arguments = parser.parse_args()
    dice, bad = random.Random(arguments.seed), list[str]()
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder)) as cluster:
        quiet = play(cluster, "quiet", [], {}, 1800)
        print(f"undisturbed: {quiet.seconds}", flush=True)
        expected = content(cluster, "quiet")
        for number in range(arguments.pipelines):
            share = arguments.kills // arguments.pipelines
            start, faults = time.monotonic(), draw(dice, STEPS, share)
            outcome = play(cluster, f"faulty{number}", faults, quiet.seconds, 3600)
            found = differences(expected, content(cluster, outcome.name))
            bad += found
            heads = sum((fault.what, fault.machine) == ("kill", "head") for fault in faults)
            print(f"{outcome.name}: {time.monotonic() - start:.0f} s, submitted {outcome.submissions} times, "
                  f"{heads} heads killed: {found or 'the same content'}", flush=True)  # fmt: skip
    return bool(bad)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
