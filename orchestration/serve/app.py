"""The HTTP interface of `latentzoom serve`: pictures in, tiles and whole renderings out.

POST   /pictures                              a picture file as the body → 201 and its id
GET    /pictures/{id}                         what it is, and how far its latent is
DELETE /pictures/{id}
GET    /pictures/{id}/tiles/{level}/{x}_{y}   a tile, in the Deep Zoom convention
GET    /pictures/{id}.dzi, /pictures/{id}_files/{level}/{x}_{y}.png   the same, where other viewers look for it
GET    /pictures/{id}/render                  the whole or a window at any size: PNG, TIFF, JPEG, ... (renderings.py)
POST   /pictures/{id}/renderings              the same, to be asked about (GET /jobs/{id}) and fetched (/jobs/{id}/file)
POST   /generate                              seeds, latent size → 201 and ids
GET    /models, /health, /metrics, /openapi.json
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.resources
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import generate_latest

from orchestration.serve.access import Access, Guard, too_large
from orchestration.serve.answers import MISTAKES, PNG_ANSWER, Mistake, answer_errors
from orchestration.serve.deep_zoom import Pyramid
from orchestration.serve.renderings import add_renderings
from orchestration.serve.samples import SAMPLES, sample
from orchestration.serve.scenes import Look, Scene
from orchestration.serve.server import Generate, Limits, Server, Told
from orchestration.serve.shown import shrunk_size
from pipeline.allocator import give_back_freed_memory
from pipeline.errors import UserError
from pipeline.reading import read_picture
from pipeline.sizes import parse_size

__all__ = ["Limits", "Server", "make_app"]

Shrink = Annotated[int, Query(ge=1, le=64, description="reduce the picture to 1/shrink of height and width first")]

TRIM = 5.0
"""Seconds between two times that freed memory is given back."""
PICTURE_BODY = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {
    "type": "string", "format": "binary"}}}}}  # fmt: skip


def make_app(server: Server, access: Access) -> FastAPI:
    """The application; `access` decides who may use it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        aside = [asyncio.create_task(work) for work in (_sweep(server), _trim(), server.work_ahead())]
        yield
        for task in aside:
            task.cancel()
        server.close()

    app = FastAPI(
        title="latentzoom",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        version="1",
        responses={status: {"model": Mistake, "description": text} for status, text in MISTAKES.items()},
    )
    app.add_middleware(Guard, access=access, most_bytes=server.limits.upload_bytes)
    answer_errors(app, server)
    _add_tiles(app, server)
    _add_pictures(app, server)
    add_renderings(app, server)
    _add_generation(app, server)
    _add_service(app, server)
    page = importlib.resources.files("orchestration.serve") / "page"
    app.mount("/", StaticFiles(directory=str(page), html=True), name="page")
    return app


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
            headers = {"ETag": etag, "Cache-Control": "private, no-cache"}  # the address may name other weights soon
            if _matches(request.headers.get("if-none-match", ""), etag):
                return Response(status_code=304, headers=headers)
            data = await server.tile(scene, level, x, y, look, _wanted(request))
        server.metrics.tiles.labels(look).inc()
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
        multiple = model.denoiser.multiple if model.denoiser is not None else 1
        if latent[0] % multiple or latent[1] % multiple:
            raise UserError(f"a latent of {latent[0]}x{latent[1]} is not allowed; give multiples of {multiple}")
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
            raise UserError(too_large(most))
        parts.append(part)
    if not size:
        raise UserError("the request has no body; send a picture file")
    return b"".join(parts)


def _matches(header: str, etag: str) -> bool:
    """Whether If-None-Match names an ETag (RFC 9110, 13.1.2: weak comparison)."""
    return header.strip() == "*" or etag in [one.strip().removeprefix("W/") for one in header.split(",")]


def _wanted(request: Request) -> Callable[[], Awaitable[bool]]:
    async def is_wanted() -> bool:
        return not await request.is_disconnected()

    return is_wanted


async def _sweep(server: Server) -> None:
    while True:
        await asyncio.sleep(60)
        with contextlib.suppress(OSError):  # a folder that is away for a while
            for ident in await asyncio.to_thread(server.shelf.sweep):
                server.scenes.forget(ident)
            await asyncio.to_thread(server.jobs.sweep)
        with contextlib.suppress(UserError):  # a store that is away for a while
            await asyncio.to_thread(server.catalogue.refresh)


async def _trim() -> None:
    while True:
        await asyncio.sleep(TRIM)
        await asyncio.to_thread(give_back_freed_memory)
