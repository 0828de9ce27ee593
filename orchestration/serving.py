"""The work of `latentzoom serve`: one server on one machine, or replicas on a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
import webbrowser
from types import FrameType

from orchestration.serve.access import LOOPBACK, Access
from orchestration.serve.arguments import Arguments
from orchestration.serve.on_ray import NAME, Replicas, application
from orchestration.serve.settings import Settings
from orchestration.tracking import store as tracking
from pipeline.common_options import note, out
from pipeline.errors import UserError
from pipeline.progress import Notice

GRACE = 5
"""Seconds for answers under way when it ends."""
KEEP_ALIVE = 75
"""Seconds that a connection may rest between a person's looks: a shorter time closes it as the next request comes."""


def run(arguments: Arguments, token: str, notice: Notice) -> int:
    """Serve until interrupted."""
    import uvicorn

    from orchestration.serve.app import make_app

    server = settings_of(arguments).make_server()
    token = token or ("" if arguments.host in LOOPBACK else secrets.token_urlsafe(24))
    listening = bound(arguments.host, arguments.port)
    address = _address(arguments.host, listening.getsockname()[1], token)
    notice.over()
    # Past what takes secrets out of all that is printed: this one is for whoever started the server.
    print(address, file=sys.__stdout__ or sys.stdout, flush=True)
    if arguments.open:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        make_app(server, Access(token)),
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=KEEP_ALIVE,
    )

    class Stopping(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            server.stop()  # renderings and sampling, for which it would wait
            super().handle_exit(sig, frame)

    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
        Stopping(config).run(sockets=[listening])
    return 0


def run_on_ray(arguments: Arguments, token: str, notice: Notice) -> int:
    """On the cluster that this process belongs to: replicas that stay when it ends. The token is in the cluster's
    environment, since a job's log is no place for one."""
    import ray
    from ray import serve

    made = application(settings_of(arguments), replicas_of(arguments), token)
    ray.init(address="auto", log_to_driver=False)
    serve.start(http_options={"host": arguments.host, "port": arguments.port, "location": "EveryNode"})
    serve.run(made, name=NAME, route_prefix="/")
    notice.over()
    print(_address(arguments.host, arguments.port, ""), file=out(), flush=True)
    note(f"it stays when this job ends; end it with: serve delete {NAME}")
    return 0


def submit(arguments: Arguments, words: list[str]) -> int:
    """Have a cluster serve: a job of it that starts the replicas."""
    from orchestration.cluster.submitting import submit_command

    return submit_command(["serve", "--on-ray", *words], address=arguments.address)


def settings_of(arguments: Arguments) -> Settings:
    store = arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return Settings(
        models=arguments.model,
        keep=str(arguments.keep or ""),
        hours=arguments.hours,
        memory=arguments.memory,
        threads=arguments.threads,
        device=arguments.device,
        dtype=arguments.dtype,
        store=tracking.tracking_uri(store) if store else "",
    )


def replicas_of(arguments: Arguments) -> Replicas:
    least, _, most = arguments.replicas.partition(":")
    try:
        numbers = int(least), int(most or least)
    except ValueError:
        raise UserError(f"--replicas {arguments.replicas} is not allowed; use NUM, or LEAST:MOST") from None
    return Replicas(
        min_num=numbers[0],
        max_num=numbers[1],
        num_gpus=arguments.gpus_per_replica,
        num_cpus=arguments.cpus_per_replica,
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens. `UserError` where the port is taken."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}; give another --port") from error
    listening.listen(128)
    return listening


def _address(host: str, port: int, token: str) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
