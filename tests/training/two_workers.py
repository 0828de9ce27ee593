"""Starts processes that are each other's workers, as torchrun does: gloo over loopback, no Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys


def start_workers(*command: str, num: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """The same Python command (`-m module ...` or a file) as each of `num` workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **common, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num)
    ]


def outputs(workers: list[subprocess.Popen[str]]) -> list[str]:
    """What each has written, once all have ended well."""
    texts = [worker.communicate()[0] for worker in workers]
    for worker, text in zip(workers, texts):
        assert worker.returncode == 0, text
    return texts
