"""`LatentZoom.view`: the page inside a notebook, served by the notebook's own process."""

from __future__ import annotations

import html
import io
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from orchestration.serve.access import Access
from orchestration.serve.app import Limits, Server, make_app
from orchestration.serve.catalogue import Catalogue
from orchestration.serve.shelf import Shelf
from orchestration.serving import bound
from pipeline.model import LatentZoom
from pipeline.reading import PictureSource, read_picture


@dataclass(frozen=True)
class View:
    """What a notebook shows as a frame. address: of the page, for a browser on this machine."""

    address: str
    height: int

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{html.escape(self.address)}" width="100%" height="{self.height}" style="border: 0" '
            'title="latentzoom" allow="clipboard-read"></iframe>'
        )


def view(model: LatentZoom, image: PictureSource, height: int) -> View:
    """Put `image` on the shelf of this process's server, which the first call starts, with `model` in its list."""
    port, server = _running()
    name = server.catalogue.add(f"{model.config.name} ({model.dtype})".replace("torch.", ""), model)
    picture = read_picture(image)
    stream = io.BytesIO()
    shown = picture.image
    if picture.alpha is not None:
        shown = shown.convert("RGB" if shown.mode != "L" else "L")
        shown.putalpha(picture.alpha)
    shown.save(stream, "PNG", icc_profile=picture.icc or None)
    entry = server.shelf.add_file(stream.getvalue(), "picture.png", picture.size, model=name)
    return View(f"http://127.0.0.1:{port}/?picture={entry.id}", height)


_lock = threading.Lock()
_started: list[tuple[int, Server, tempfile.TemporaryDirectory[str]]] = []


def _running() -> tuple[int, Server]:
    with _lock:
        if not _started:
            folder = tempfile.TemporaryDirectory(prefix="latentzoom-view-")
            limits = Limits()
            shelf = Shelf(Path(folder.name), max_bytes=limits.disk_bytes, seconds=limits.expiry_seconds)
            server = Server(Catalogue([]), shelf, limits, 2)
            listening = bound("127.0.0.1", 0)
            app = uvicorn.Server(uvicorn.Config(make_app(server, Access()), access_log=False, log_level="warning"))
            threading.Thread(target=app.run, kwargs={"sockets": [listening]}, daemon=True).start()
            _started.append((listening.getsockname()[1], server, folder))
        return _started[0][:2]
