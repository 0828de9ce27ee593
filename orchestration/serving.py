"""The work of `latentzoom serve`: one server on one machine."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import webbrowser
from pathlib import Path

import uvicorn

from orchestration import tracking
from orchestration.serve.access import LOOPBACK, Access
from orchestration.serve.app import Limits, Server, make_app
from orchestration.serve.catalogue import Catalogue
from orchestration.serve.shelf import Shelf
from orchestration.verbs.serve import Arguments
from pipeline.errors import UserError
from pipeline.progress import Notice
from pipeline.reading import use_own_size_limit


def run(arguments: Arguments, token: str, notice: Notice) -> int:
    """Serve until interrupted."""
    use_own_size_limit()
    limits = Limits(memory_bytes=int(arguments.memory * (1 << 30)), expiry_seconds=arguments.hours * 3600)
    store = arguments.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    store = tracking.tracking_uri(store) if store else ""
    catalogue = Catalogue(list(arguments.model), device=arguments.device, dtype=arguments.dtype, store=store)
    model = catalogue.get().model
    shelf = Shelf(arguments.keep or _cache(), max_bytes=limits.disk_bytes, seconds=limits.expiry_seconds)
    threads = arguments.threads or (2 if model.device.type == "cuda" else os.cpu_count() or 1)
    server = Server(catalogue, shelf, limits, threads)
    is_own = arguments.host in LOOPBACK
    token = token or ("" if is_own else secrets.token_urlsafe(24))
    listening = _bound(arguments.host, arguments.port)
    shown = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    address = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    notice.over()
    print(address, flush=True)
    if arguments.open:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(make_app(server, Access(token)), access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _cache() -> Path:
    return Path(os.environ.get("LATENTZOOM_CACHE") or Path.home() / ".cache" / "latentzoom") / "serve"


def _bound(host: str, port: int) -> socket.socket:
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
