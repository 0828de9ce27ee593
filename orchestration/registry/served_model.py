"""The registered model as `mlflow models serve` runs it (a models-from-code file: MLflow stores this text, no pickle).

One request row is one job. `task` is "generate" (num, height, width, seed, steps) or "upscale" (image as base64 of
a picture file, and scale, or height and width). Every picture comes back as a row: request, seed, height, width, png
(base64). `pipeline.served_request` says what a row may hold, `docs/serving.md` how to ask.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from pipeline.canvas import png_bytes
from pipeline.errors import UserError
from pipeline.model import LatentZoom, target_size
from pipeline.reading import Picture, read_picture
from pipeline.served_request import MAX_PICTURES, Generate, Upscale, check_pixels, parse_row, picture_bytes

MAX_INPUT_PIXELS = 1 << 24


class BadRequest(MlflowException):
    """A mistake of whoever asks: status 400 and one sentence. The server would put the whole table before it."""

    def __init__(self, sentence: str) -> None:
        self._sentence = ""
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._sentence

    @message.setter
    def message(self, text: str) -> None:
        self._sentence = self._sentence or text


class ServedModel(PythonModel):
    """Loads the bundle among the model's artifacts once, then answers `generate` and `upscale` rows."""

    def load_context(self, context: Any) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LatentZoom.load(context.artifacts["bundle"], device=device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """All rows are checked before the first is worked on. Raises `BadRequest` naming the row."""
        jobs = []
        for index, row in enumerate(_rows(model_input)):
            with _row(index):
                jobs.append(parse_row(row, self.model.config.image_size))
        num = sum(job.num if isinstance(job, Generate) else 1 for job in jobs)
        if num > MAX_PICTURES:
            raise BadRequest(f"{num} pictures in one call are not allowed; use at most {MAX_PICTURES}")
        answers: list[dict[str, Any]] = []
        for index, job in enumerate(jobs):
            with _row(index):
                answers += [{"request": index, **answer} for answer in self._answer(job)]
        return pd.DataFrame(answers, columns=["request", "seed", "height", "width", "png"])

    def _answer(self, job: Generate | Upscale) -> list[dict[str, Any]]:
        if isinstance(job, Generate):
            pictures = self.model.generate(num=job.num, size=job.size, seed=job.seed, num_steps=job.steps)
        else:
            picture = _read(job.image)
            check_pixels(target_size(picture.size, job.scale, job.size))
            pictures = [self.model.upscale(picture, job.scale, size=job.size, seed=job.seed, num_steps=job.steps)]
        return [
            {"seed": job.seed + i, "height": p.height, "width": p.width, "png": encode_png(p)}
            for i, p in enumerate(pictures)
        ]


@contextlib.contextmanager
def _row(index: int) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise BadRequest(f"request {index}: {error}") from error


def _rows(model_input: Any) -> list[Mapping[Any, Any]]:
    """The request as rows: a table, a list of objects, one object, or an object of columns."""
    if isinstance(model_input, pd.DataFrame):
        return model_input.to_dict("records")
    if isinstance(model_input, Mapping):
        cells = _plain(model_input)
        is_columns = any(isinstance(column, (list, tuple)) for column in cells.values())
        try:
            return pd.DataFrame(cells).to_dict("records") if is_columns else [cells]
        except ValueError as error:
            raise BadRequest(f"the request's columns do not fit together: {error}") from error
    rows = list(model_input) if hasattr(model_input, "__iter__") and not isinstance(model_input, str) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise BadRequest("the request holds no rows with named columns; send dataframe_records, a list of objects")
    return [_plain(row) for row in rows]


def _plain(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """MLflow makes arrays of what does not come as a table."""
    return {name: cell.tolist() if isinstance(cell, np.ndarray) else cell for name, cell in row.items()}


def decode_picture(text: str) -> Picture:
    """Base64 of any picture file, or a data URI; the size is checked before anything is decoded."""
    return _read(picture_bytes(text))


def _read(data: bytes) -> Picture:
    return read_picture(data, "`image`", MAX_INPUT_PIXELS)


def encode_png(picture: Image.Image) -> str:
    return base64.b64encode(png_bytes(picture)).decode("ascii")


mlflow.models.set_model(ServedModel())
