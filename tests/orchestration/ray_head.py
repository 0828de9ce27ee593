"""A real Ray head: free ports on the loopback, token authentication, its own folder, killed by process id."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """address: of the job server. gcs: what `ray start --address` joins. environment: for processes that may use it."""

    address: str
    gcs: str
    token: str
    environment: dict[str, str]
    metrics_port: int
    agent_port: int
    host: str = "127.0.0.1"

    @property
    def dashboard_port(self) -> int:
        return int(self.address.rpartition(":")[2])


def free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def status(url: str, token: str = "", data: bytes | None = None) -> int:
    """HTTP status of a request to the head."""
    request = urllib.request.Request(url, data=data, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


def _growing(gcs: int, worker: dict[str, float], most: int) -> tuple[dict[str, object], dict[str, str]]:
    """Ray's own autoscaler with its provider for tests: a machine that it starts is one more raylet on this one."""
    head_id = "f" * 51 + "00000"
    kinds = {
        "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    provider = {
        "type": "external", "module": _PROVIDER, "head_node_id": head_id, "gcs_address": f"127.0.0.1:{gcs}",
        "launch_multiple": True, "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    config = {
        "cluster_name": "growing", "max_workers": most, "upscaling_speed": 1.0, "idle_timeout_minutes": 5,
        "provider": provider, "auth": {}, "available_node_types": kinds, "head_node_type": "ray.head.default",
        **{f"{kind}_commands": [] for kind in ("setup", "head_setup", "worker_setup", "initialization")},
        "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {},
        "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    }  # fmt: skip
    environment = {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": head_id, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
    }  # fmt: skip
    return config, environment


@contextlib.contextmanager
def ray_head(num_cpus: int = 2, *, grows_by: dict[str, float] | None = None, most: int = 1) -> Iterator[Head]:
    """Start a head and wait until it takes jobs; kill all of its processes at the end.

    grows_by: resources of one machine, of which its autoscaler starts up to `most` when they are asked for.
    """
    folder = Path(tempfile.mkdtemp(prefix="lz-", dir="/tmp"))  # socket paths must be short
    token = secrets.token_hex(16)
    (folder / "token").write_text(token)
    gcs, dashboard, agent, client, metrics = free_ports(5)
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--metrics-export-port={metrics}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}/ray",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    own = {}
    if grows_by:
        config, own = _growing(gcs, grows_by, most)
        (folder / "autoscaling.json").write_text(json.dumps(config))
        command.append(f"--autoscaling-config={folder}/autoscaling.json")
    log = open(folder / "log", "w+")  # noqa: SIM115
    process = subprocess.Popen(command, env=environment | own, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        head = Head(address, f"127.0.0.1:{gcs}", token, environment, metrics, agent)
        wait_for_jobs_server(process, head, folder / "log")
        yield head
    finally:
        kill_tree(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(head: Head, num_cpus: int = 1, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """One more node of the head's cluster, up when the block begins. `kill_tree` of the process is a lost machine."""
    agent, metrics, runtime_env = free_ports(3)
    name = f"node-{secrets.token_hex(4)}"
    command = [
        str(BIN / "ray"), "start", f"--address={head.gcs}", "--block", "--disable-usage-stats", f"--node-name={name}",
        "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={runtime_env}", f"--num-cpus={num_cpus}", "--object-store-memory=100000000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=head.environment | (environment or {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while name not in alive_nodes(head):
            assert process.poll() is None, f"ray start ended with {process.returncode}"
            time.sleep(0.2)
        yield process
    finally:
        kill_tree(process)
        while name in alive_nodes(head):  # the head takes a while to notice, and would send work there meanwhile
            time.sleep(0.2)


def alive_nodes(head: Head) -> set[str]:
    """Names of the nodes that the head counts as alive."""
    request = urllib.request.Request(f"{head.address}/api/v0/nodes", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        nodes = json.load(answer)["data"]["result"]["result"]
    return {node["node_name"] for node in nodes if node["state"] == "ALIVE"}


def wait_for_jobs_server(process: subprocess.Popen, head: Head, log: Path) -> None:
    """Poll until the head lists jobs and is a node of its own cluster: what runs them comes up last."""
    while True:
        if process.poll() is not None:
            raise AssertionError(f"ray start failed: {log.read_text()[-3000:]}")
        try:
            if status(f"{head.address}/api/jobs/", head.token) == 200 and alive_nodes(head):
                return
        except OSError:
            pass
        time.sleep(0.3)


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and everything it started."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(family)
