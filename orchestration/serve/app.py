"""The HTTP interface of `latentzoom serve`: pictures in, tiles and whole renderings out.

POST   /pictures                              a picture file as the body → 201 and its id
GET    /pictures/{id}                         what it is, and how far its latent is
DELETE /pictures/{id}
GET    /pictures/{id}/tiles/{level}/{x}_{y}   a tile, in the Deep Zoom convention
GET    /pictures/{id}.dzi, /pictures/{id}_files/{level}/{x}_{y}.png   the same, where other viewers look for it
GET    /pictures/{id}/render                  the whole or a window at any size, streamed: PNG, TIFF, JPEG, ...
POST   /generate                              seeds, latent size → 201 and ids
GET    /models, /jobs/{id}, /health, /metrics, /openapi.json
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.resources
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from orchestration.serve.access import Access
from orchestration.serve.catalogue import Catalogue
from orchestration.serve.deep_zoom import TILE, Pyramid
from orchestration.serve.desk import Busy, Desk, Unwanted
from orchestration.serve.samples import SAMPLES, sample
from orchestration.serve.scenes import Look, Scene, Scenes, shrunk_size
from orchestration.serve.shelf import Entry, NotThere, Shelf
from orchestration.serve.tiles import encoded, media_type
from pipeline.canvas import Pixels, write_canvas
from pipeline.errors import UserError
from pipeline.formats import format_of
from pipeline.geometry import check_window
from pipeline.reading import read_picture
from pipeline.sizes import Size, Window, parse_size

Shrink = Annotated[int, Query(ge=1, le=64, description="reduce the picture to 1/shrink of height and width first")]
SAMPLERS = 8
"""Requests that are sampled at the same time."""
MAX_SEED = (1 << 53) - 1
"""JavaScript tells whole numbers apart up to here."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server gives. upload_bytes: of a picture file. picture_pixels, render_pixels: of what is given and of
    what is drawn. queue, seconds, sampling_seconds: of requests that wait. memory_bytes: of all latents and features.
    disk_bytes, expiry_seconds: of what is kept."""

    upload_bytes: int = 64 << 20
    picture_pixels: int = 100_000_000
    render_pixels: int = 1 << 28
    latent_cells: int = 1 << 16
    steps: int = 200
    seeds: int = 16
    queue: int = 256
    seconds: float = 120.0
    sampling_seconds: float = 1800.0
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

    def __init__(self, desk: Desk, scenes: Scenes) -> None:
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.tiles = Counter("latentzoom_serve_tiles", "Tiles drawn.", ["look"], **make)
        self.refused = Counter("latentzoom_serve_refused", "Requests refused, by status.", ["status"], **make)
        self.seconds = Histogram("latentzoom_serve_tile_seconds", "From the request of a tile to its answer.", **make)
        for name, text, value in (
            ("waiting", "Requests in the queue.", lambda: desk.waiting),
            ("busy", "Requests being worked on.", lambda: desk.busy),
            ("memory_bytes", "Memory of latents and features.", scenes.num_bytes),
        ):
            Gauge(f"latentzoom_serve_{name}", text, **make).set_function(value)


class Server:
    """What the routes share."""

    def __init__(self, catalogue: Catalogue, shelf: Shelf, limits: Limits, num_threads: int) -> None:
        self.catalogue, self.shelf, self.limits = catalogue, shelf, limits
        self.scenes = Scenes(shelf, catalogue, limits.memory_bytes)
        self.desk = Desk(num_threads, queue=limits.queue, seconds=limits.seconds)
        # Those who sample wait for the network most of the time, which works for all of them at once.
        self.samplers = Desk(SAMPLERS, queue=limits.queue, seconds=limits.sampling_seconds)
        self.metrics = Metrics(self.desk, self.scenes)
        self.jobs: dict[str, Job] = {}
        self.sampling: dict[str, asyncio.Task[None]] = {}
        self._preparing: set[asyncio.Task[None]] = set()

    async def scene(self, ident: str, model: str) -> Scene:
        return await asyncio.to_thread(self.scenes.get, ident, model)

    def prepare(self, ident: str, address: str) -> None:
        """Make the latent of a picture whose tiles will be asked for."""

        def make() -> None:
            with contextlib.suppress(UserError):  # whoever asks for a tile hears of it
                self.scenes.get(ident, address).drawing()

        task = asyncio.create_task(self.samplers.do(make))
        self._preparing.add(task)
        task.add_done_callback(self._prepared)

    def _prepared(self, task: asyncio.Task[None]) -> None:
        self._preparing.discard(task)
        if not task.cancelled():
            task.exception()  # known to be of no matter: the tile's request tries again

    def described(self, entry: Entry, scene: Scene | None = None) -> dict[str, Any]:
        """What a client is told of a picture."""
        pyramid = Pyramid(entry.size)
        ready = {} if scene is None else {"is_ready": scene.is_ready, "progress": scene.progress.done}
        return {
            "id": entry.id,
            "name": entry.name,
            "height": entry.size[0],
            "width": entry.size[1],
            "model": entry.model or self.catalogue.default,
            "is_generated": bool(entry.recipe),
            "seed": entry.recipe.get("seed"),
            "shrink": entry.shrink,
            "tile_size": TILE,
            "own_level": pyramid.own,
            "top_level": pyramid.top,
            "full_height": pyramid.full[0],
            "full_width": pyramid.full[1],
            "expires_in_seconds": self.limits.expiry_seconds,
            **ready,
        }


def make_app(server: Server, access: Access) -> FastAPI:
    """The application; `access` decides who may use it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(server))
        yield
        sweeper.cancel()
        server.desk.close()
        server.samplers.close()

    app = FastAPI(title="latentzoom", docs_url=None, redoc_url=None, lifespan=lifespan, version="1")
    app.middleware("http")(access.check)
    _answer_errors(app, server)
    _add_tiles(app, server)
    _add_pictures(app, server)
    _add_renderings(app, server)
    _add_generation(app, server)
    _add_service(app, server)
    page = importlib.resources.files("orchestration.serve") / "page"
    app.mount("/", StaticFiles(directory=str(page), html=True), name="page")
    return app


def _answer_errors(app: FastAPI, server: Server) -> None:
    def answer(status: int, error: Exception, **headers: str) -> JSONResponse:
        server.metrics.refused.labels(str(status)).inc()
        return JSONResponse({"error": str(error)}, status, headers=headers)

    app.exception_handler(NotThere)(lambda _, error: answer(404, error))
    app.exception_handler(Busy)(lambda _, error: answer(503, error, **{"Retry-After": "1"}))
    app.exception_handler(Unwanted)(lambda _, error: answer(499, error))
    app.exception_handler(UserError)(lambda _, error: answer(422, error))


def _add_pictures(app: FastAPI, server: Server) -> None:
    @app.post("/pictures", status_code=201, summary="Give a picture file, as the request's body")
    async def give(request: Request, name: str = "picture", model: str = "", shrink: Shrink = 1) -> dict[str, Any]:
        data = await _body(request, server.limits.upload_bytes)
        return await add(data, Path(name).name[:200] or "picture", model, shrink)

    async def add(data: bytes, label: str, model: str, shrink: int) -> dict[str, Any]:
        def read() -> Entry:
            loaded = server.catalogue.get(model)
            picture = read_picture(data, label, server.limits.picture_pixels)
            size = shrunk_size(picture.size, shrink)
            entry = server.shelf.add_file(data, label, size, model=model, shrink=shrink)
            server.scenes.add(entry, loaded, picture)
            return entry

        told = server.described(await server.desk.do(read))
        server.prepare(told["id"], model)
        return told

    @app.get("/samples", summary="Photographs that come along")
    async def samples() -> list[str]:
        return list(SAMPLES)

    @app.post("/samples/{name}", status_code=201, summary="Give one of them")
    async def give_sample(name: str, model: str = "", shrink: Shrink = 1) -> dict[str, Any]:
        return await add(await asyncio.to_thread(sample, name), name, model, shrink)

    @app.get("/pictures/{ident}", summary="What a picture is")
    async def told(ident: str, model: str = "") -> dict[str, Any]:
        scene = await server.scene(ident, model)
        return server.described(scene.entry, scene)

    @app.delete("/pictures/{ident}", status_code=204, summary="Remove a picture")
    async def removed(ident: str) -> Response:
        await asyncio.to_thread(server.shelf.remove, ident)
        server.scenes.forget(ident)
        return Response(status_code=204)


def _add_tiles(app: FastAPI, server: Server) -> None:
    async def tile(request: Request, ident: str, level: int, x: int, y: int, model: str, look: Look) -> Response:
        with server.metrics.seconds.time():
            scene = await server.scene(ident, model)
            scene.pyramid.window(level, x, y)  # before any work
            parts = scene.entry.sha256, scene.entry.shrink, scene.loaded.name, level, x, y, look
            etag = f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"'
            headers = {"ETag": etag, "Cache-Control": "private, max-age=86400"}
            if request.headers.get("if-none-match") == etag:
                return Response(status_code=304, headers=headers)
            if scene.is_drawn(level, look):
                await _ready(server, scene)
            data = await server.desk.do(lambda: encoded(scene.tile(level, x, y, look)), _wanted(request))
        server.metrics.tiles.labels(look).inc()
        server.scenes.tidy()
        return Response(data, media_type="image/png", headers=headers)

    @app.get("/pictures/{ident}/tiles/{level}/{column}_{row}", summary="A tile", response_class=Response)
    async def own(request: Request, ident: str, level: int, column: int, row: int, model: str = "",
                  look: Look = "ours") -> Response:  # fmt: skip
        return await tile(request, ident, level, column, row, model, look)

    @app.get("/pictures/{ident}_files/{level}/{column}_{row}.png", summary="A tile, for other viewers",
             response_class=Response)  # fmt: skip
    async def deep_zoom(request: Request, ident: str, level: int, column: int, row: int, model: str = "",
                        look: Look = "ours") -> Response:  # fmt: skip
        return await tile(request, ident, level, column, row, model, look)

    @app.get("/pictures/{ident}.dzi", summary="The Deep Zoom descriptor", response_class=Response)
    async def descriptor(ident: str) -> Response:
        entry = await asyncio.to_thread(server.shelf.get, ident)
        return Response(Pyramid(entry.size).descriptor("png"), media_type="application/xml")


def _add_renderings(app: FastAPI, server: Server) -> None:
    @app.get("/pictures/{ident}/render", summary="The whole, or a window of it, at any size", response_class=Response)
    async def render(
        request: Request,
        ident: str,
        size: Annotated[str, Query(description="HEIGHTxWIDTH of the whole; or give `scale`")] = "",
        scale: Annotated[float, Query(gt=0, le=256)] = 1.0,
        window: Annotated[str, Query(description="y0,x0,y1,x1 in pixels of that size; the whole without")] = "",
        format: Literal["png", "tif", "jpg", "webp", "avif"] = "png",
        quality: Annotated[int, Query(ge=1, le=100)] = 95,
        model: str = "",
        look: Look = "ours",
        job: Annotated[str, Query(max_length=64, description="a name of your choice, for GET and DELETE /jobs")] = "",
    ) -> Response:
        scene = await server.scene(ident, model)
        whole, part = _asked(scene.entry.size, size, scale, window)
        shape = part[2] - part[0], part[3] - part[1]
        if shape[0] * shape[1] > server.limits.render_pixels:
            raise UserError(
                f"a rendering of {shape[0]}x{shape[1]} is too large here; at most {server.limits.render_pixels} pixels"
            )
        name = f"{Path(scene.entry.name).stem or 'picture'}-{shape[1]}x{shape[0]}.{format}"
        format_of(name, shape)
        if look == "ours":
            await _ready(server, scene)
        task = Job(shape[0] * shape[1])
        known_as = job or secrets.token_urlsafe(8)
        server.jobs[known_as] = task
        folder = tempfile.TemporaryDirectory(prefix="latentzoom-render-")

        def work() -> Path:
            target = Path(folder.name) / f"render.{format}"

            def draw(inner: Window) -> Pixels:
                y0, x0, y1, x1 = inner
                return scene.window(whole, (part[0] + y0, part[1] + x0, part[0] + y1, part[1] + x1), look)

            channels = scene.channels
            write_canvas(target, shape, draw, channels=channels, quality=quality, on_pixels=task.on_pixels)
            return target

        try:
            file = await _unless_gone(request, server.desk.do(work, _wanted(request)), task)
        except BaseException:
            folder.cleanup()
            raise
        finally:
            server.jobs.pop(known_as, None)
            server.scenes.tidy()
        return FileResponse(
            file, filename=name, media_type=media_type(format), background=BackgroundTask(folder.cleanup)
        )

    @app.get("/jobs/{job}", summary="How far a rendering is")
    async def progress(job: str) -> dict[str, int]:
        if job not in server.jobs:
            raise NotThere(f"there is no rendering {job[:64]!r} under way")
        return {"done": server.jobs[job].done, "pixels": server.jobs[job].num_pixels}

    @app.delete("/jobs/{job}", status_code=204, summary="Stop a rendering")
    async def stopped(job: str) -> Response:
        if job in server.jobs:
            server.jobs[job].is_stopped = True
        return Response(status_code=204)


def _add_generation(app: FastAPI, server: Server) -> None:
    @app.post("/generate", status_code=201, summary="Draw new pictures")
    async def generate(wanted: Generate) -> list[dict[str, Any]]:
        limits = server.limits
        if len(wanted.seeds) > limits.seeds:
            raise UserError(f"{len(wanted.seeds)} seeds are not allowed here; at most {limits.seeds}")
        address = wanted.model or server.catalogue.default
        model = (await asyncio.to_thread(server.catalogue.get, address)).model
        if model.config.task != "generation":
            raise UserError(f"{address} is for super-resolution and draws nothing; choose a model for generation")
        steps = model.evaluations(wanted.steps)
        if steps > limits.steps:
            raise UserError(f"steps = {steps} is not allowed here; at most {limits.steps}")
        latent = parse_size(wanted.latent_size) if wanted.latent_size else (model.config.latent_size,) * 2
        if latent[0] * latent[1] > limits.latent_cells:
            raise UserError(
                f"a latent of {latent[0]}x{latent[1]} is not allowed here; at most {limits.latent_cells} cells"
            )
        factor = model.config.autoencoder.factor
        size = parse_size(wanted.size) if wanted.size else (latent[0] * factor, latent[1] * factor)
        if size[0] * size[1] > limits.picture_pixels:
            raise UserError(f"pictures of {size[0]}x{size[1]} are not allowed here; zoom in instead")
        entries = [
            await asyncio.to_thread(
                server.shelf.add_recipe, {"seed": seed, "steps": steps, "latent_size": list(latent)},
                f"seed {seed}", size, address,
            )
            for seed in wanted.seeds
        ]  # fmt: skip
        task = asyncio.create_task(server.samplers.do(lambda: server.scenes.generate(entries)))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        for entry in entries:
            server.sampling[entry.id] = task
        return [server.described(entry) for entry in entries]


def _add_service(app: FastAPI, server: Server) -> None:
    @app.get("/models", summary="Models that may be chosen")
    async def models() -> dict[str, Any]:
        listed = await asyncio.to_thread(server.catalogue.listed)
        return {"default": server.catalogue.default, "models": [asdict(model) for model in listed]}

    @app.get("/health", summary="Whether pictures can be drawn")
    async def health() -> dict[str, Any]:
        loaded = await asyncio.to_thread(server.catalogue.get)
        return {"is_ready": True, "model": loaded.name, "waiting": server.desk.waiting, "busy": server.desk.busy}

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type="text/plain; version=0.0.4")


async def _body(request: Request, most: int) -> bytes:
    """The request's body. `UserError` as soon as it is too large."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise UserError(f"the picture file is too large; at most {most >> 20} MiB")
        parts.append(part)
    if not size:
        raise UserError("the request has no body; send a picture file")
    return b"".join(parts)


def _asked(own: Size, size: str, scale: float, window: str) -> tuple[Size, Window]:
    """(H, W) of the whole, and the window of it."""
    whole = parse_size(size) if size else parse_size("x".join(str(max(1, round(side * scale))) for side in own))
    try:
        edges = tuple(int(edge) for edge in window.split(",")) if window else None
    except ValueError:
        edges = (0,)
    return whole, check_window(edges, whole)  # type: ignore[arg-type]


def _wanted(request: Request) -> Callable[[], Awaitable[bool]]:
    async def is_wanted() -> bool:
        return not await request.is_disconnected()

    return is_wanted


async def _unless_gone(request: Request, work: Awaitable[Path], job: Job) -> Path:
    """The result of work that stops when the one who asked goes away."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        job.is_stopped = True

    watcher = asyncio.create_task(watch())
    try:
        return await work
    finally:
        watcher.cancel()


async def _ready(server: Server, scene: Scene) -> None:
    """Wait for the latent that a picture is drawn from, where it takes sampling: with others, or now."""
    if (task := server.sampling.get(scene.entry.id)) is not None:
        await asyncio.shield(task)
        server.sampling.pop(scene.entry.id, None)
    if not scene.is_ready:
        await server.samplers.do(scene.drawing)


async def _sweep(server: Server) -> None:
    while True:
        await asyncio.sleep(60)
        for ident in await asyncio.to_thread(server.shelf.sweep):
            server.scenes.forget(ident)
