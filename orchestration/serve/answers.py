"""What the routes answer besides what was asked for: mistakes, each one sentence."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from orchestration.serve.desk import Busy, Unwanted
from orchestration.serve.server import Server
from orchestration.serve.shelf import Full, NotThere
from pipeline.errors import UserError

MISTAKES: dict[int | str, str] = {
    401: "A token is needed",
    403: "Not from here",
    411: "Only picture files may be of a length that is not said",
    413: "Too large a body",
    404: "No such picture, or not any more",
    422: "Something that is not allowed",
    503: "Too much to do; Retry-After says when to try again",
    507: "No room for more",
}
Answers = dict[int | str, dict[str, Any]]
PNG_ANSWER: Answers = {
    200: {"description": "The pixels", "content": {"image/png": {}}},
    304: {"description": "They are those of If-None-Match"},
}
FILE_ANSWER: Answers = {
    200: {
        "description": "The file",
        "content": {f"image/{form}": {} for form in ("png", "tiff", "jpeg", "webp", "avif")},
    }
}


class Mistake(BaseModel):
    """One sentence that says what to do."""

    error: str


def answer_errors(app: FastAPI, server: Server) -> None:
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
