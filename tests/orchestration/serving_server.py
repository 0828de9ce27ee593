"""A real server on a free port of this machine, in a thread of the test."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests
import uvicorn
from PIL import Image

from orchestration.serve.access import Access
from orchestration.serve.app import Limits, Server, make_app
from orchestration.serve.catalogue import Catalogue
from orchestration.serve.shelf import Shelf
from orchestration.serving import bound


@dataclass
class Running:
    url: str
    server: Server

    def give(self, data: bytes, **values: str | int) -> dict:
        answer = requests.post(f"{self.url}/pictures", data=data, params=values, timeout=60)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def get(self, path: str, **values: str | int) -> requests.Response:
        return requests.get(f"{self.url}{path}", params=values, timeout=60)


@contextlib.contextmanager
def running(
    folder: Path, *models: str, limits: Limits | None = None, token: str = "", store: str = "", port: int = 0
) -> Iterator[Running]:
    limits = limits or Limits()
    catalogue = Catalogue(list(models), store=store)
    shelf = Shelf(folder, max_bytes=limits.disk_bytes, seconds=limits.expiry_seconds)
    server = Server(catalogue, shelf, limits, 2)
    listening = bound("127.0.0.1", port)
    app = uvicorn.Server(uvicorn.Config(make_app(server, Access(token)), log_level="warning", access_log=False))
    thread = threading.Thread(target=app.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not app.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", server)
    finally:
        app.should_exit = True
        thread.join()


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def wait(until, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)
