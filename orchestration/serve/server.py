"""What the routes of `latentzoom serve` share: limits, the work under way, and what a client is told of a picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel, Field

from orchestration.serve.catalogue import Catalogue
from orchestration.serve.deep_zoom import TILE, Pyramid
from orchestration.serve.desk import Busy, Desk, Unwanted
from orchestration.serve.scenes import Scene, Scenes
from orchestration.serve.shelf import Shelf
from pipeline.errors import UserError

SAMPLERS = 8
"""Requests that are sampled at the same time."""
RENDERERS = 2
"""Renderings that are drawn at the same time, beside the threads for tiles: nobody's view stops for another's file."""
MAX_SEED = (1 << 53) - 1
"""JavaScript tells whole numbers apart up to here."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server gives. upload_bytes: of a picture file. picture_pixels, render_pixels: of what is given and of
    what is drawn. queue, seconds, long_seconds: of requests that wait; long ones sample or render. memory_bytes: of all
    latents and features. disk_bytes, expiry_seconds: of what is kept."""

    upload_bytes: int = 64 << 20
    picture_pixels: int = 100_000_000
    render_pixels: int = 1 << 28
    latent_cells: int = 1 << 16
    steps: int = 200
    seeds: int = 16
    queue: int = 256
    seconds: float = 120.0
    long_seconds: float = 1800.0
    memory_bytes: int = 2 << 30
    disk_bytes: int = 4 << 30
    expiry_seconds: float = 24 * 3600.0


class Generate(BaseModel):
    """What to draw. size: of each picture, such as 700x1000; latent_size: such as 64x96; both as trained without."""

    seeds: Annotated[list[Annotated[int, Field(ge=0, le=MAX_SEED)]], Field(min_length=1)]
    size: str = ""
    latent_size: str = ""
    steps: Annotated[int | None, Field(ge=1)] = None
    model: str = ""


class Told(BaseModel):
    """A picture. height, width: its own, after it was shrunk; own_level has that size, top_level full_height by
    full_width. is_ready: whether its latent is there; progress: how far that is, 0 to 1; problem: why there is none."""

    id: str
    name: str
    height: int
    width: int
    model: str
    is_generated: bool
    seed: int | None
    shrink: int
    tile_size: int
    own_level: int
    top_level: int
    full_height: int
    full_width: int
    expires_in_seconds: float
    is_ready: bool
    progress: float
    problem: str


class Job:
    """A rendering under way, to be asked about and to be stopped."""

    def __init__(self, num_pixels: int) -> None:
        self.num_pixels, self.done, self.is_stopped = num_pixels, 0, False

    def on_pixels(self, num: int) -> None:
        if self.is_stopped:
            raise Unwanted("the rendering was stopped")
        self.done += num


class Metrics:
    """For Prometheus."""

    def __init__(self, server: Server) -> None:
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.tiles = Counter("latentzoom_serve_tiles", "Tiles drawn.", ["look"], **make)
        self.refused = Counter("latentzoom_serve_refused", "Requests refused, by status.", ["status"], **make)
        self.seconds = Histogram("latentzoom_serve_tile_seconds", "From the request of a tile to its answer.", **make)
        for name, text, value in (
            ("waiting", "Tiles in the queue.", lambda: server.desk.waiting),
            ("busy", "Tiles being drawn.", lambda: server.desk.busy),
            ("rendering", "Renderings under way or waiting.", lambda: len(server.jobs)),
            ("sampling", "Latents being made.", lambda: server.samplers.busy),
            ("memory_bytes", "Memory of latents and features.", server.scenes.num_bytes),
            ("disk_bytes", "Picture files that are kept.", server.shelf.num_bytes),
        ):
            Gauge(f"latentzoom_serve_{name}", text, **make).set_function(value)


class Server:
    """What the routes share."""

    def __init__(self, catalogue: Catalogue, shelf: Shelf, limits: Limits, num_threads: int) -> None:
        self.catalogue, self.shelf, self.limits = catalogue, shelf, limits
        self.scenes = Scenes(shelf, catalogue, limits.memory_bytes)
        self.desk = Desk(num_threads, queue=limits.queue, seconds=limits.seconds)
        self.renderers = Desk(RENDERERS, queue=limits.queue, seconds=limits.long_seconds)
        # Those who sample wait for the network most of the time, which works for all of them at once.
        self.samplers = Desk(SAMPLERS, queue=limits.queue, seconds=limits.long_seconds)
        self.jobs: dict[str, Job] = {}
        self._making: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.metrics = Metrics(self)

    async def scene(self, ident: str, model: str) -> Scene:
        return await asyncio.to_thread(self.scenes.get, ident, model)

    def make(self, scene: Scene) -> asyncio.Task[None]:
        """The task that makes a picture's latent: one for all who wait for it."""
        if (task := self._making.get(scene.key)) is not None:
            return task

        def work() -> None:
            scene.drawing()

        return self._begin([scene], work)

    def generate(self, scenes: list[Scene]) -> None:
        """Have the latents of several generated pictures sampled together."""
        self._begin(scenes, lambda: self.scenes.generate(scenes))

    async def ready(self, scene: Scene) -> None:
        """Wait for the latent."""
        if not scene.is_ready:
            await asyncio.shield(self.make(scene))

    def stop(self) -> None:
        """Have all work end that takes long."""
        self.scenes.close()
        for job in list(self.jobs.values()):
            job.is_stopped = True

    def close(self) -> None:
        """No more work."""
        self.stop()
        for desk in (self.desk, self.renderers, self.samplers):
            desk.close()

    def _begin(self, scenes: list[Scene], work: Callable[[], None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self.samplers.do(work))
        for scene in scenes:
            self._making[scene.key] = task
        task.add_done_callback(lambda done: self._made(scenes, done))
        return task

    def _made(self, scenes: list[Scene], task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        for scene in scenes:
            if self._making.get(scene.key) is task:
                del self._making[scene.key]
            if error is not None and not isinstance(error, Busy | Unwanted):  # those pass
                scene.problem = str(error) if isinstance(error, UserError) else "its latent could not be made"
        self.scenes.tidy()

    def described(self, scene: Scene) -> Told:
        """What a client is told of a picture."""
        entry = scene.entry
        pyramid = Pyramid(entry.size)
        return Told(
            id=entry.id,
            name=entry.name,
            height=entry.size[0],
            width=entry.size[1],
            model=entry.model or self.catalogue.default,
            is_generated=bool(entry.recipe),
            seed=entry.recipe.get("seed"),
            shrink=entry.shrink,
            tile_size=TILE,
            own_level=pyramid.own,
            top_level=pyramid.top,
            full_height=pyramid.full[0],
            full_width=pyramid.full[1],
            expires_in_seconds=self.limits.expiry_seconds,
            is_ready=scene.is_ready,
            progress=1.0 if scene.is_ready else scene.progress.done,
            problem=scene.problem,
        )
