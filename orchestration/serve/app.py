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
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from orchestration.serve.access import Access, Guard
from orchestration.serve.deep_zoom import Pyramid
from orchestration.serve.desk import Busy, Unwanted
from orchestration.serve.samples import SAMPLES, sample
from orchestration.serve.scenes import Look, Scene, shrunk_size
from orchestration.serve.server import Generate, Job, Limits, Server, Told
from orchestration.serve.shelf import Full, NotThere
from orchestration.serve.tiles import encoded, media_type
from pipeline.canvas import Pixels, write_canvas
from pipeline.errors import UserError
from pipeline.formats import format_of
from pipeline.geometry import check_window
from pipeline.reading import read_picture
from pipeline.sizes import Size, Window, parse_size

__all__ = ["Limits", "Server", "make_app"]

Shrink = Annotated[int, Query(ge=1, le=64, description="reduce the picture to 1/shrink of height and width first")]

MISTAKES: dict[int | str, str] = {
    404: "No such picture, or not any more",
    422: "Something that is not allowed",
    503: "Too much to do; Retry-After says when to try again",
}
Answers = dict[int | str, dict[str, Any]]
PNG_ANSWER: Answers = {200: {"description": "The pixels", "content": {"image/png": {}}}}
FILE_ANSWER: Answers = {
    200: {
        "description": "The file",
        "content": {f"image/{form}": {} for form in ("png", "tiff", "jpeg", "webp", "avif")},
    }
}
PICTURE_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {
    "type": "string", "format": "binary"}}}}}  # fmt: skip


class Mistake(BaseModel):
    """One sentence that says what to do."""

    error: str


def make_app(server: Server, access: Access) -> FastAPI:
    """The application; `access` decides who may use it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(server))
        yield
        sweeper.cancel()
        server.close()

    app = FastAPI(
        title="latentzoom",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        version="1",
        responses={status: {"model": Mistake, "description": text} for status, text in MISTAKES.items()},
        max_body_size=server.limits.upload_bytes + (1 << 16),
    )
    app.add_middleware(Guard, access=access)
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

    def validated(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        said = "; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors())
        return answer(422, UserError(f"{said}; /openapi.json describes what is allowed"))

    def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return answer(error.status_code, UserError(str(error.detail)))

    app.exception_handler(NotThere)(lambda _, error: answer(404, error))
    app.exception_handler(Busy)(lambda _, error: answer(503, error, **{"Retry-After": "1"}))
    app.exception_handler(Unwanted)(lambda _, error: answer(499, error))
    app.exception_handler(ClientDisconnect)(lambda *_: answer(499, Unwanted("nobody waits for it any more")))
    app.exception_handler(Full)(lambda _, error: answer(507, error))
    app.exception_handler(UserError)(lambda _, error: answer(422, error))
    app.exception_handler(RequestValidationError)(validated)
    app.exception_handler(HTTPException)(refused)
    app.exception_handler(500)(lambda *_: answer(500, UserError("the server failed here; its log says why")))


def _add_pictures(app: FastAPI, server: Server) -> None:
    @app.post("/pictures", status_code=201, summary="Give a picture file, as the request's body",
              openapi_extra=PICTURE_BODY)  # fmt: skip
    async def give(request: Request, name: str = "picture", model: str = "", shrink: Shrink = 1) -> Told:
        data = await _body(request, server.limits.upload_bytes)
        return await add(data, Path(name).name[:200] or "picture", model, shrink)

    async def add(data: bytes, label: str, model: str, shrink: int) -> Told:
        def read() -> Scene:
            loaded = server.catalogue.get(model)
            picture = read_picture(data, label, server.limits.picture_pixels)
            size = shrunk_size(picture.size, shrink)
            entry = server.shelf.add_file(data, label, size, model=model, shrink=shrink)
            return server.scenes.add(entry, loaded, picture)

        scene = await server.desk.do(read)
        server.make(scene)  # its tiles will be asked for
        return server.described(scene)

    @app.get("/samples", summary="Photographs that come along")
    async def samples() -> list[str]:
        return list(SAMPLES)

    @app.post("/samples/{name}", status_code=201, summary="Give one of them")
    async def give_sample(name: str, model: str = "", shrink: Shrink = 1) -> Told:
        return await add(await asyncio.to_thread(sample, name), name, model, shrink)

    @app.get("/pictures/{ident}", summary="What a picture is, and how far its latent; asking has it made")
    async def told(ident: str, model: str = "") -> Told:
        scene = await server.scene(ident, model)
        if not scene.is_ready and not scene.problem:
            server.make(scene)
        return server.described(scene)

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
            if _matches(request.headers.get("if-none-match", ""), etag):
                return Response(status_code=304, headers=headers)
            if scene.is_drawn(level, look):
                await server.ready(scene)
            data = await server.desk.do(lambda: encoded(scene.tile(level, x, y, look)), _wanted(request))
        server.metrics.tiles.labels(look).inc()
        server.scenes.tidy()
        return Response(data, media_type="image/png", headers=headers)

    @app.get(
        "/pictures/{ident}/tiles/{level}/{column}_{row}",
        summary="A tile",
        response_class=Response,
        responses=PNG_ANSWER,
    )
    async def own(request: Request, ident: str, level: int, column: int, row: int, model: str = "",
                  look: Look = "ours") -> Response:  # fmt: skip
        return await tile(request, ident, level, column, row, model, look)

    @app.get("/pictures/{ident}_files/{level}/{column}_{row}.png", summary="A tile, for other viewers",
             response_class=Response, responses=PNG_ANSWER)  # fmt: skip
    async def deep_zoom(request: Request, ident: str, level: int, column: int, row: int, model: str = "",
                        look: Look = "ours") -> Response:  # fmt: skip
        return await tile(request, ident, level, column, row, model, look)

    @app.get("/pictures/{ident}.dzi", summary="The Deep Zoom descriptor", response_class=Response,
             responses={200: {"content": {"application/xml": {}}}})  # fmt: skip
    async def descriptor(ident: str) -> Response:
        entry = await asyncio.to_thread(server.shelf.get, ident)
        return Response(Pyramid(entry.size).descriptor("png"), media_type="application/xml")


def _add_renderings(app: FastAPI, server: Server) -> None:
    @app.get("/pictures/{ident}/render", summary="The whole, or a window of it, at any size", response_class=Response,
             responses=FILE_ANSWER)  # fmt: skip
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
        known_as = job or secrets.token_urlsafe(16)
        if known_as in server.jobs:
            raise UserError(f"a rendering {known_as!r} is under way already; give another name")
        task = server.jobs[known_as] = Job(shape[0] * shape[1])
        try:
            folder = tempfile.TemporaryDirectory(prefix="latentzoom-render-", ignore_cleanup_errors=True)
        except OSError as error:
            del server.jobs[known_as]
            raise Full(f"a rendering cannot be kept here: {error.strerror or error}") from error

        def work() -> Path:
            task.on_pixels(0)  # it may be stopped before it begins
            target = Path(folder.name) / f"render.{format}"

            def draw(inner: Window) -> Pixels:
                y0, x0, y1, x1 = inner
                return scene.window(whole, (part[0] + y0, part[1] + x0, part[0] + y1, part[1] + x1), look)

            channels = scene.channels
            write_canvas(target, shape, draw, channels=channels, quality=quality, on_pixels=task.on_pixels)
            return target

        async def drawn() -> Path:
            if look == "ours":
                await server.ready(scene)
            return await server.renderers.do(work)

        try:
            file = await _unless_gone(request, drawn(), task)
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
    async def generate(wanted: Generate) -> list[Told]:
        limits = server.limits
        server.samplers.check()
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
        scenes = [await server.scene(entry.id, "") for entry in entries]
        server.generate(scenes)
        return [server.described(scene) for scene in scenes]


def _add_service(app: FastAPI, server: Server) -> None:
    @app.get("/models", summary="Models that may be chosen")
    async def models() -> dict[str, Any]:
        listed, problem = await asyncio.to_thread(server.catalogue.listed)
        models = [asdict(model) for model in listed]
        return {"default": server.catalogue.default, "models": models, "problem": problem}

    @app.get("/health", summary="Whether pictures can be drawn")
    async def health() -> dict[str, Any]:
        loaded = await asyncio.to_thread(server.catalogue.get)
        return {"is_ready": True, "model": loaded.name, "waiting": server.desk.waiting, "busy": server.desk.busy}

    @app.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse)
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


def _matches(header: str, etag: str) -> bool:
    """Whether If-None-Match names an ETag (RFC 9110, 13.1.2: weak comparison)."""
    return header.strip() == "*" or etag in [one.strip().removeprefix("W/") for one in header.split(",")]


def _wanted(request: Request) -> Callable[[], Awaitable[bool]]:
    async def is_wanted() -> bool:
        return not await request.is_disconnected()

    return is_wanted


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Path], job: Job) -> Path:
    """The result of work, which stops when the one who asked goes away or waits no longer."""
    drawing = asyncio.create_task(work)
    try:
        while not (await asyncio.wait([drawing], timeout=0.5))[0]:
            if await request.is_disconnected() or (job.is_stopped and not job.done):
                raise Unwanted("the rendering was stopped")
        return drawing.result()
    finally:
        if not drawing.done():  # its thread ends at the next window
            job.is_stopped = True
            drawing.cancel()


async def _sweep(server: Server) -> None:
    while True:
        await asyncio.sleep(60)
        with contextlib.suppress(OSError):  # a folder that is away for a while
            for ident in await asyncio.to_thread(server.shelf.sweep):
                server.scenes.forget(ident)
