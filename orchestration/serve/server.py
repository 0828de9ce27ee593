"""What the routes of `latentzoom serve` share: limits, the work under way, and what a client is told of a picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from pydantic import BaseModel, Field

from orchestration.serve.catalogue import Catalogue
from orchestration.serve.deep_zoom import TILE
from orchestration.serve.desk import Busy, Desk, Unwanted
from orchestration.serve.features import FeatureWork, IsWanted
from orchestration.serve.jobs import Jobs
from orchestration.serve.scenes import Look, Scene, Scenes
from orchestration.serve.shelf import Shelf
from orchestration.serve.tiles import SentTiles, encoded
from pipeline.errors import UserError

SAMPLERS = 8
"""Requests that are sampled at the same time."""
RENDERERS = 2
"""Renderings that are drawn at the same time, beside the threads for tiles: nobody's view stops for another's file."""
MAX_SEED = (1 << 53) - 1
"""JavaScript tells whole numbers apart up to here."""
SENT_SHARE = 16
"""1 / this of the memory is for tiles that were sent."""


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
    full_width. is_ready: whether its latent is there; progress: how far that is, 0 to 1; problem: why there is none.
    memory_bytes: of the picture, its latent and the features that are kept of it."""

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
    memory_bytes: int


class Metrics:
    """For Prometheus."""

    def __init__(self, server: Server) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        make: dict[str, Any] = {"registry": self.registry}
        self.tiles = Counter("latentzoom_serve_tiles", "Tiles drawn.", ["look"], **make)
        self.features = Counter("latentzoom_serve_features", "Blocks of features made.", **make)
        self.refused = Counter("latentzoom_serve_refused", "Requests refused, by status.", ["status"], **make)
        self.seconds = Histogram("latentzoom_serve_tile_seconds", "From the request of a tile to its answer.", **make)
        for name, text, value in (
            ("waiting", "Tiles in the queue.", lambda: server.desk.waiting + server.features.num_waiting),
            ("busy", "Tiles being drawn.", lambda: server.desk.busy),
            ("making", "Features being made, for tiles that wait or ahead.", lambda: server.features.desk.busy),
            ("rendering", "Renderings under way or waiting.", lambda: len(server.jobs)),
            ("sampling", "Latents being made.", lambda: server.samplers.busy),
            ("memory_bytes", "Memory of pictures, latents, features and sent tiles.", server.num_bytes),
            ("models", "Models in memory.", lambda: server.catalogue.num_loaded),
            ("disk_bytes", "Picture files that are kept.", server.shelf.num_bytes),
        ):
            Gauge(f"latentzoom_serve_{name}", text, **make).set_function(value)


class Server:
    """What the routes share."""

    def __init__(self, catalogue: Catalogue, shelf: Shelf, limits: Limits, num_threads: int) -> None:
        self.catalogue, self.shelf, self.limits = catalogue, shelf, limits
        self.sent = SentTiles(limits.memory_bytes // SENT_SHARE)
        self.scenes = Scenes(shelf, catalogue, limits.memory_bytes - self.sent.max_bytes)
        self.desk = Desk(num_threads, queue=limits.queue, seconds=limits.seconds)
        # What tiles wait for, and what takes long: beside what is short.
        makers = Desk(num_threads, queue=64 * limits.queue, seconds=limits.seconds, is_aside=True)
        self.features = FeatureWork(makers, self.scenes, limits.queue, lambda: self.metrics.features.inc())
        self.renderers = Desk(RENDERERS, queue=limits.queue, seconds=limits.long_seconds, is_aside=True)
        # Those who sample wait for the network most of the time, which works for all of them at once.
        self.samplers = Desk(SAMPLERS, queue=limits.queue, seconds=limits.long_seconds, is_aside=True)
        self._desks = self.desk, makers, self.renderers, self.samplers
        self.jobs = Jobs(shelf.folder / ".jobs", max_bytes=limits.disk_bytes)
        self._making: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.metrics = Metrics(self)

    async def scene(self, ident: str, model: str) -> Scene:
        self.features.asked()
        held = self.scenes.at_once(ident, model)
        return held if held is not None else await asyncio.to_thread(self.scenes.get, ident, model)

    async def tile(self, scene: Scene, level: int, x: int, y: int, look: Look, is_wanted: IsWanted) -> bytes:
        """A PNG. Raises `UserError`, `Busy`, and `Unwanted` when nobody waits for it any more."""
        key = *scene.key, level, x, y, look
        if (data := self.sent.get(key)) is not None:
            return data
        if scene.is_drawn(scene.pyramid.level_size(level), look):
            await self.ready(scene)
            if tiles := scene.missing(level, x, y):
                await self.features.have(scene, tiles, is_wanted)
        data = await self.desk.do(lambda: encoded(scene.tile(level, x, y, look)), is_wanted, whose=scene.key)
        self.features.asked()
        self.sent.put(key, data)
        return data

    async def work_ahead(self) -> None:
        """Make what may be asked for next, while there is nothing else to do. Never ends."""
        await self.features.work_ahead(lambda: all(desk.is_idle for desk in self._desks))

    def num_bytes(self) -> int:
        """Memory of pictures, latents, features and sent tiles."""
        return self.scenes.num_bytes() + self.sent.num_bytes

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
        self.jobs.stop_all()
        for desk in self._desks:
            desk.stop()

    def close(self) -> None:
        """No more work."""
        self.stop()
        for desk in self._desks:
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
        entry, pyramid = scene.entry, scene.pyramid
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
            memory_bytes=scene.num_bytes,
        )
