"""What a cluster has room for. One that is just starting, or has just lost a machine, is not too small: wait for its
autoscaler as long as it is at work, and for another machine in place of a lost one."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

FIRST_WORD_S = 10.0
"""So long it may take until a cluster that is just up hears of its autoscaler for the first time."""
NOTICE_S = 30.0
"""So long Ray may take to notice that a machine is lost."""
PATIENCE_S = 120.0
"""So long an autoscaler may say of nothing that it starts, and so long a lost machine may be without another in its
place; an autoscaler looks every few seconds."""


def await_machines(each: dict[str, float], num: int) -> dict[str, float]:
    """Wait until the cluster has room for `num` times `each` → its resources then.

    Returns at once where they are there already, or where nobody could bring them: no autoscaler, and no machine lost
    that may come back. While an autoscaler is at work the wait has no end: machines of a cloud may be long in coming.
    It ends when the autoscaler has said of nothing for `PATIENCE_S` seconds that it starts, and no machine came; then
    the resources are less than what was asked for.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    there = ray.cluster_resources()
    if _fits(there, each, num) or not _comes(lambda: has_autoscaler() or has_lost_machines(), FIRST_WORD_S):
        return there
    wanted = ", ".join(f"{num * amount:g} {name}" for name, amount in each.items() if amount)
    whom = "the autoscaler" if has_autoscaler() else "a lost machine's successor"
    print(f"waiting for {whom}: {wanted} needed, {_listing(there, each)} there", file=sys.stderr, flush=True)
    request_resources(bundles=[{name: amount for name, amount in each.items() if amount}] * num)
    try:
        return _poll(ray.cluster_resources, each, num)
    finally:
        request_resources(bundles=[])  # from now on the workers' own demand holds the machines


def reachable_resources() -> dict[str, float]:
    """The most of each resource that this cluster has, had on machines that it lost, or may get by its autoscaler: what
    to plan for while its machines are still starting, or being replaced."""
    import ray
    from ray._private.state import state

    found: Counter[str] = Counter()
    for node in ray.nodes():
        found.update(node.get("Resources", {}))
    limits: dict[str, float] = {}
    with contextlib.suppress(Exception):  # Ray's own Train asks so, and has no public way
        limits = dict(state.get_max_resources_from_cluster_config() or {})
    there = ray.cluster_resources()
    return {name: max(found[name], limits.get(name, 0.0), there.get(name, 0.0)) for name in {*found, *limits, *there}}


def machine_cpus() -> list[float]:
    """CPUs of each machine of the cluster."""
    import ray

    return [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]


def cpus_for_each(machines: list[float], num_workers: int) -> float:
    """CPUs to reserve for each worker, so that every one finds room on some machine: a whole number, or less than one
    on a single machine with fewer CPUs than workers.

    machines: CPUs of each. One CPU while there are too few (more machines may start on demand).
    """
    for cpus in range(int(max(machines, default=0)), 0, -1):
        if sum(int(there // cpus) for there in machines) >= num_workers:
            return cpus
    total = sum(machines)
    return total / num_workers if len(machines) == 1 and total > 0 else 1


def gpus_of_each(asked: float | None, resources: dict[str, float]) -> float:
    """GPUs of each worker: as many as were asked for, or one where the cluster has any or can get them."""
    return float(resources.get("GPU", 0.0) > 0) if asked is None else asked


def check_capacity(resources: dict[str, float], workers: int, cpus: float, gpus: float) -> None:
    """`UserError` where the resources have no room for so many workers with so many CPUs and GPUs each."""
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if (there := resources.get(name, 0.0)) < workers * each:
            raise UserError(
                f"{workers} workers with {each:g} {name} each need {workers * each:g} {name}, and Ray has {there:g}; "
                f"use fewer workers, {'--gpus-per-worker 0' if name == 'GPU' else 'less for each'}, or add machines"
            )


def await_room(workers: int, cpus: float, gpus: float) -> None:
    """Wait for machines that may still come, until there is room for so many workers with so many CPUs and GPUs each.
    Nobody brings machines to a Ray that this process started for itself. `UserError` where there is no room then."""
    import ray

    is_own = not os.environ.get("RAY_ADDRESS")
    there = ray.cluster_resources() if is_own else await_machines({"CPU": cpus, "GPU": gpus}, workers)
    check_capacity(there, workers, cpus, gpus)


def _comes(ask: Callable[[], bool], within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not (answer := ask()) and time.monotonic() < end:
        time.sleep(1)
    return answer


def _poll(ask: Callable[[], dict[str, float]], each: dict[str, float], num: int) -> dict[str, float]:
    there, news = ask(), time.monotonic()
    while not _fits(there, each, num) and time.monotonic() - news < PATIENCE_S:
        time.sleep(1)
        before, there = there, ask()
        if there != before or is_scaling():
            news = time.monotonic()
    return there


def has_autoscaler() -> bool:
    """Whether an autoscaler has ever told this cluster anything."""
    return (_status().stats.autoscaler_version or "0") != "0"


def has_lost_machines() -> bool:
    """Whether this cluster has had more machines than it has."""
    import ray

    return any(not node["Alive"] for node in ray.nodes())


def machines() -> dict[str, str]:
    """Addresses of the machines that are there, by Ray's ids."""
    import ray

    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def lost_machines(before: dict[str, str], error: BaseException) -> list[str]:
    """Addresses of `machines` from before that are not there any more, where `error`, of Ray Train, may come of that.
    Ray notices a while after its workers were lost."""
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import WorkerGroupError

    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    if len(before) < 2 or not any(isinstance(failure, RayActorError) for failure in failures):
        return []
    deadline = time.monotonic() + NOTICE_S
    while not (lost := before.keys() - machines().keys()) and time.monotonic() < deadline:
        time.sleep(1.0)
    return sorted(before[ident] for ident in lost)


def is_scaling() -> bool:
    """Whether the autoscaler says that machines are about to start."""
    status = _status()
    return bool(status.pending_launches or status.pending_nodes)


def _status() -> ClusterStatus:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address)


def _fits(there: dict[str, float], each: dict[str, float], num: int) -> bool:
    return all(there.get(name, 0.0) >= num * amount for name, amount in each.items())


def _listing(there: dict[str, float], each: dict[str, float]) -> str:
    return ", ".join(f"{there.get(name, 0.0):g} {name}" for name, amount in each.items() if amount)
