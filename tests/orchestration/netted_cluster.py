"""A cluster as it is in a data centre, on a `network`: head, two workers, S3 endpoint and MLflow, each on an address of
its own. The endpoint is moto's simulator. It keeps all in memory, so what can be killed is the door before it: every
connection breaks, nothing answers, and its disk, as a real store's, is there again afterwards.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import sys
import urllib.request
from collections.abc import Iterator

import boto3
from network import Machine, Network, network, wait_until
from ray_head import BIN, status

from orchestration.cli import main

_S3, _MLFLOW, _RAY, _DASHBOARD = 9000, 5000, 6379, 8265
_DOOR = """
import asyncio, sys
async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
async def serve(reader, writer):
    inner = await asyncio.open_connection("127.0.0.1", 9001)
    await asyncio.gather(copy(reader, inner[1]), copy(inner[0], writer), return_exceptions=True)
async def main():
    await (await asyncio.start_server(serve, sys.argv[1], 9000)).serve_forever()
asyncio.run(main())
"""


class Cluster:
    def __init__(self, net: Network) -> None:
        self.net, self.token = net, secrets.token_hex(16)
        self.store, self.tracker, self.head = net.add("store"), net.add("tracker"), net.add("head")
        self.workers = [net.add("worker-1"), net.add("worker-2")]
        self.moto = net.add("moto", beside=self.store)
        self.tracking_uri = f"http://{self.tracker.address}:{_MLFLOW}"
        self.endpoint = f"http://{self.store.address}:{_S3}"
        self.address = f"http://{self.head.address}:{_DASHBOARD}"
        (net.folder / "token").write_text(self.token)
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_TRACKING_URI": self.tracking_uri,
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(net.folder / "token"),
            "PATH": f"{BIN}:{os.environ.get('PATH', '')}", "OMP_NUM_THREADS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "no_proxy": "*",
            "RAY_health_check_period_ms": "1000",
        }  # fmt: skip

    def start(self) -> None:
        self.moto.start(str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", "9001")
        self.store.start(sys.executable, "-c", _DOOR, self.store.address)
        wait_until(lambda: self._makes_bucket(), f"the store: {self.moto.log}")
        words = [sys.executable, "-m", "mlflow", "server", "--host", self.tracker.address, "--port", str(_MLFLOW)]
        words += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.net.disk}/mlflow.db"]
        words += [
            "--artifacts-destination",
            "s3://bucket/mlflow",
            "--allowed-hosts",
            f"{self.tracker.address}:{_MLFLOW}",
        ]
        self.tracker.start(*words, **self.environment)
        self.start_head()
        for worker in self.workers:
            self._start_ray(worker, f"--address={self.head.address}:{_RAY}", "--num-cpus=1")
        wait_until(lambda: self.tracker.listens(_MLFLOW), f"the tracker: {self.tracker.log}")
        self.await_nodes()

    def start_head(self) -> None:
        words = ["--head", f"--port={_RAY}", f"--dashboard-host={self.head.address}", "--num-cpus=0"]
        self._start_ray(self.head, *words, f"--temp-dir={self.net.disk}/ray")

    def await_nodes(self, num: int = 3) -> None:
        wait_until(lambda: len(self.nodes()) >= num, f"{num} nodes: {self.head.log}", 240)

    def nodes(self) -> list[str]:
        """Addresses of the machines that the head counts as alive; none while it does not answer."""
        request = urllib.request.Request(
            f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {self.token}"}
        )
        try:
            if status(f"{self.address}/api/jobs/", self.token) != 200:
                return []
            with urllib.request.urlopen(request, timeout=10) as answer:
                found = json.load(answer)["data"]["result"]["result"]
        except (OSError, http.client.HTTPException, KeyError, TypeError):
            return []
        return [node["node_ip"] for node in found if node["state"] == "ALIVE"]

    def submit(self, words: list[str], name: str) -> int:
        return main(["submit", *words, "--address", self.address, "--detach", "--submission-id", name])

    def job_log(self, name: str) -> str:
        """What the job has said so far, read on the head's disk: whatever is cut."""
        with contextlib.suppress(OSError):
            for path in self.head.disk.glob(f"ray/session_2*/logs/job-driver-{name}.log"):
                return path.read_text(errors="replace")
        return ""

    def s3(self):
        return boto3.client("s3", endpoint_url=self.endpoint, aws_access_key_id="test", aws_secret_access_key="test",
                            region_name="us-east-1")  # fmt: skip

    def objects(self, prefix: str) -> dict[str, bytes]:
        s3, found = self.s3(), {}
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix):
            for entry in page.get("Contents", []):
                body = s3.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read()
                found[entry["Key"].removeprefix(prefix)] = body
        return found

    def _makes_bucket(self) -> bool:
        if not self.store.listens(_S3):
            return False
        with contextlib.suppress(Exception):
            self.s3().create_bucket(Bucket="bucket")
            return True
        return False

    def _start_ray(self, machine: Machine, *words: str) -> None:
        common = ["--block", "--disable-usage-stats", f"--node-ip-address={machine.address}"]
        common += ["--object-store-memory=100000000", f"--node-name={machine.name}"]
        machine.start(str(BIN / "ray"), "start", *words, *common, again=True, **self.environment)


@contextlib.contextmanager
def netted_cluster() -> Iterator[Cluster]:
    with network() as net:
        cluster = Cluster(net)
        cluster.start()
        yield cluster
