"""Routes of whole renderings: a file that is drawn while its client waits, or one that is asked about and then fetched,
which is how a page saves gigabytes without holding them."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from orchestration.serve.answers import FILE_ANSWER
from orchestration.serve.desk import Unwanted
from orchestration.serve.jobs import Job, Progress
from orchestration.serve.scenes import Look, Scene
from orchestration.serve.server import Server
from orchestration.serve.tiles import media_type
from pipeline.canvas import Pixels, write_canvas
from pipeline.errors import UserError
from pipeline.formats import format_of
from pipeline.geometry import check_window
from pipeline.sizes import Size, Window, parse_size


class Wanted(BaseModel):
    """What to draw."""

    size: str = Field("", description="HEIGHTxWIDTH of the whole; or give `scale`")
    scale: float = Field(1.0, gt=0, le=256)
    window: str = Field("", description="y0,x0,y1,x1 in pixels of that size; the whole without")
    format: Literal["png", "tif", "jpg", "webp", "avif"] = "png"
    quality: int = Field(95, ge=1, le=100)
    model: str = ""
    look: Look = "ours"


class WantedNow(Wanted):
    job: str = Field("", max_length=64, description="a name of your choice, for GET and DELETE /jobs")


class Begun(BaseModel):
    """A rendering under way. job: for /jobs; file: the name it will be saved by."""

    job: str
    file: str


def add_renderings(app: FastAPI, server: Server) -> None:
    alone: set[asyncio.Task[None]] = set()  # the loop holds tasks by weak references only

    @app.get("/pictures/{ident}/render", summary="The whole, or a window of it, at any size", response_class=Response,
             responses=FILE_ANSWER)  # fmt: skip
    async def render(request: Request, ident: str, wanted: Annotated[WantedNow, Query()]) -> Response:
        name = wanted.job or secrets.token_urlsafe(16)
        scene, whole, part, file = await _planned(server, ident, wanted)
        job = await asyncio.to_thread(server.jobs.begin, name, _num_pixels(part), file)
        try:
            await _unless_gone(request, _drawn(server, scene, whole, part, wanted, job), job)
            job.finish()
        except BaseException:
            server.jobs.remove(name)
            raise
        finally:
            server.jobs.end(name)
        task = BackgroundTask(server.jobs.remove, name)
        return FileResponse(job.file, filename=file, media_type=media_type(wanted.format), background=task)

    @app.post("/pictures/{ident}/renderings", status_code=202, summary="The same, to be asked about and then fetched")
    async def begin(ident: str, wanted: Annotated[Wanted, Query()]) -> Begun:
        server.renderers.check()
        scene, whole, part, file = await _planned(server, ident, wanted)
        name = secrets.token_urlsafe(16)
        job = await asyncio.to_thread(server.jobs.begin, name, _num_pixels(part), file, is_alone=True)
        task = asyncio.create_task(_alone(server, name, job, _drawn(server, scene, whole, part, wanted, job)))
        alone.add(task)
        task.add_done_callback(alone.discard)
        return Begun(job=name, file=file)

    @app.get("/jobs/{job}", summary="How far a rendering is")
    async def progress(job: str) -> Progress:
        return await asyncio.to_thread(server.jobs.progress, job)

    @app.get("/jobs/{job}/file", summary="The file of a finished rendering, once", response_class=Response,
             responses=FILE_ANSWER)  # fmt: skip
    async def fetched(job: str, request: Request) -> Response:
        path, file = await asyncio.to_thread(server.jobs.file, job)
        # Who asks for a part will ask for others: then it goes when it has waited for long.
        task = None if "range" in request.headers else BackgroundTask(server.jobs.remove, job)
        return FileResponse(path, filename=file, media_type=media_type(path.suffix[1:]), background=task)

    @app.delete("/jobs/{job}", status_code=204, summary="Stop a rendering, or remove its file")
    async def stopped(job: str) -> Response:
        await asyncio.to_thread(server.jobs.stop, job)
        return Response(status_code=204)


async def _planned(server: Server, ident: str, wanted: Wanted) -> tuple[Scene, Size, Window, str]:
    """The scene, (H, W) of the whole, the window of it, and the name of the file. Raises `UserError`."""
    scene = await server.scene(ident, wanted.model)
    whole, part = _asked(scene.entry.size, wanted.size, wanted.scale, wanted.window)
    shape = part[2] - part[0], part[3] - part[1]
    if _num_pixels(part) > server.limits.render_pixels:
        raise UserError(
            f"a rendering of {shape[0]}x{shape[1]} is too large here; at most {server.limits.render_pixels} pixels"
        )
    file = f"{Path(scene.entry.name).stem or 'picture'}-{shape[1]}x{shape[0]}.{wanted.format}"
    format_of(file, shape)
    return scene, whole, part, file


async def _drawn(server: Server, scene: Scene, whole: Size, part: Window, wanted: Wanted, job: Job) -> None:
    """Have it drawn to the job's file."""

    def work() -> None:
        job.on_pixels(0)  # it may be stopped before it begins

        def draw(inner: Window) -> Pixels:
            y0, x0, y1, x1 = inner
            window = (part[0] + y0, part[1] + x0, part[0] + y1, part[1] + x1)
            return scene.window(whole, window, wanted.look)

        write_canvas(
            job.file,
            (part[2] - part[0], part[3] - part[1]),
            draw,
            channels=scene.channels,
            quality=wanted.quality,
            on_pixels=job.on_pixels,
        )

    try:
        if scene.is_drawn(whole, wanted.look):
            await server.ready(scene)
        await server.renderers.do(work)
    finally:
        server.scenes.tidy()


async def _alone(server: Server, name: str, job: Job, work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
        job.finish()
    except (Unwanted, asyncio.CancelledError):
        job.is_stopped = True
        server.jobs.remove(name)
    except UserError as error:
        job.finish(str(error))
    except Exception:
        logging.getLogger(__name__).exception("a rendering failed")
        job.finish("the server failed here; its log says why")
    finally:
        server.jobs.end(name)


def _num_pixels(window: Window) -> int:
    return (window[2] - window[0]) * (window[3] - window[1])


def _asked(own: Size, size: str, scale: float, window: str) -> tuple[Size, Window]:
    """(H, W) of the whole, and the window of it."""
    whole = parse_size(size) if size else parse_size("x".join(str(max(1, round(side * scale))) for side in own))
    try:
        edges = tuple(int(edge) for edge in window.split(",")) if window else None
    except ValueError:
        edges = (0,)
    return whole, check_window(edges, whole)  # type: ignore[arg-type]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, None], job: Job) -> None:
    """Work, which stops when the one who asked goes away or waits no longer."""
    drawing = asyncio.create_task(work)
    try:
        while not (await asyncio.wait([drawing], timeout=0.5))[0]:
            if await request.is_disconnected() or (job.is_stopped and not job.done):
                raise Unwanted("the rendering was stopped")
        drawing.result()
    finally:
        if not drawing.done():  # its thread ends at the next window
            job.is_stopped = True
            drawing.cancel()
