"""Checks of what a machine talks to: the tracking server, the head of a cluster, and all of its nodes."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Sequence
from typing import Any

from orchestration.doctor import machine
from orchestration.doctor.machine import Finding
from pipeline.errors import UserError, first_line
from pipeline.redact import redact, url_without_secrets

_MAX_SKEW_S = 30.0
_TIMEOUT_S = 15.0


def tracking_server(uri: str) -> list[Finding]:
    """Reachable, and closed to strangers."""
    from orchestration import tracking

    shown = url_without_secrets(uri)
    start = time.monotonic()
    try:
        with tracking.user_errors(uri):
            tracking.client(uri).get_experiment_by_name(tracking.EXPERIMENT)
    except UserError as error:
        todo = "start it (infra/compose.yaml), check the address, set MLFLOW_TRACKING_USERNAME and _PASSWORD"
        return [Finding("trouble", "tracking", redact(str(error)), todo)]
    except Exception as error:  # MLflow and data base drivers raise their own kinds
        todo = "use http://HOST:5000 or sqlite:////ABSOLUTE/mlflow.db; a data base of another kind needs its driver"
        text = f"cannot use {shown}: {type(error).__name__}: {redact(first_line(error))}"
        return [Finding("trouble", "tracking", text, todo)]
    found = [Finding("ok", "tracking", f"{shown} answers in {1000 * (time.monotonic() - start):.0f} ms")]
    if uri.startswith("http"):
        found += _stranger(shown) + clock(shown)
    return found


def _stranger(uri: str) -> list[Finding]:
    import requests

    url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search"
    answer = requests.post(url, json={"max_results": 1}, timeout=_TIMEOUT_S, auth=_no_auth)
    if answer.status_code == 200:
        todo = "start it with --app-name basic-auth, as infra/compose.yaml does"
        return [Finding("trouble", "tracking", f"{uri} lets anyone in without a password", todo)]
    return [Finding("ok", "tracking", f"{uri} refuses strangers ({answer.status_code})")]


def _no_auth(request: Any) -> Any:
    """An `auth` that adds nothing: keeps requests from reading ~/.netrc."""
    return request


def head(address: str) -> list[Finding]:
    """The job server of a cluster: refuses strangers, takes the token, has the same Ray."""
    import ray
    import requests

    from orchestration import jobs

    address = address.rstrip("/")
    try:
        answer = requests.get(f"{address}/api/jobs/", timeout=_TIMEOUT_S, auth=_no_auth)
    except requests.exceptions.RequestException as error:
        todo = "start the head, or forward its port: kubectl port-forward service/latentzoom-head-svc 8265"
        return [Finding("trouble", "head", f"{address} does not answer ({type(error).__name__})", todo)]
    found = []
    if answer.status_code == 200:
        todo = "restart it with RAY_AUTH_MODE=token; anyone who reaches it can run code"
        found.append(Finding("trouble", "head", f"{address} takes jobs from anyone", todo))
    else:
        found.append(Finding("ok", "head", f"{address} refuses strangers ({answer.status_code})"))
    try:
        jobs.connect(address)
    except UserError as error:
        return [*found, Finding("trouble", "head", str(error))]
    headers = {"Authorization": f"Bearer {jobs.token()}"}
    answer = requests.get(f"{address}/api/version", timeout=_TIMEOUT_S, headers=headers)
    theirs = str(answer.json().get("ray_version", "unknown"))
    if theirs != ray.__version__:
        todo = "use the same version on both sides; the image is built from requirements.lock"
        found.append(Finding("trouble", "head", f"Ray {theirs} there, {ray.__version__} here", todo))
    else:
        found.append(Finding("ok", "head", f"takes this token, Ray {theirs} on both sides"))
    return found + clock(address)


def clock(url: str) -> list[Finding]:
    """This machine's clock against the Date that a server sends. Signatures and leases need agreement."""
    import requests

    before = time.time()
    try:
        answer = requests.get(url, timeout=_TIMEOUT_S, auth=_no_auth)
    except requests.exceptions.RequestException:
        return []
    middle = (before + time.time()) / 2
    date = email.utils.parsedate_to_datetime(answer.headers["Date"]) if "Date" in answer.headers else None
    return [] if date is None else [skew(url, middle - date.timestamp())]


def skew(where: str, seconds: float) -> Finding:
    """A finding for a difference of clocks; HTTP dates are whole seconds."""
    if abs(seconds) > _MAX_SKEW_S:
        direction = "ahead of" if seconds > 0 else "behind"
        text = f"{abs(seconds):.0f} s {direction} {where}"
        return Finding("trouble", "clock", text, "synchronise it: timedatectl set-ntp true, or chrony")
    return Finding("ok", "clock", f"agrees with {where}")


def nodes(storages: Sequence[str]) -> list[Finding]:
    """The same checks on every node of the cluster that this process can join. Findings name their node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestration.ray_train import start_ray

    started = start_ray()
    try:
        check = ray.remote(num_cpus=0, max_retries=0)(_on_node)
        found = []
        alive = [node for node in ray.nodes() if node["Alive"]]
        for node in alive:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            before = time.time()
            theirs, then = ray.get(check.options(scheduling_strategy=where).remote(list(storages)))
            apart = max(0.0, before - then, then - time.time()) * (1 if then > before else -1)
            name = node["NodeManagerAddress"]
            rows = [*theirs, skew("this machine", apart)]
            found += [Finding(row.level, row.topic, f"[{name}] {row.text}", row.todo) for row in rows]
        return [Finding("ok", "cluster", f"{len(alive)} nodes, {_resources(ray.cluster_resources())}"), *found]
    finally:
        if started:
            ray.shutdown()


def _on_node(storages: list[str]) -> tuple[list[Finding], float]:
    return machine.machine(storages), time.time()


def _resources(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU"
