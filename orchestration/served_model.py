"""The registered model as `mlflow models serve` runs it (a models-from-code file: MLflow stores this text, no pickle).

One request row is one job. `task` is "generate" (num, height, width, seed, steps) or "upscale" (image as base64 PNG or
JPEG, and scale, or height and width). Every picture comes back as a row: request, seed, height, width, png (base64).
"""

from __future__ import annotations

import base64
import io
from typing import Any

import mlflow.models
import pandas as pd
from mlflow.pyfunc.model import PythonModel
from PIL import Image

from pipeline.errors import UserError
from pipeline.model import LatentZoom

MAX_PICTURES = 64
MAX_INPUT_PIXELS = 1 << 24


class ServedModel(PythonModel):
    """Loads the bundle among the model's artifacts once, then answers `generate` and `upscale` rows."""

    def load_context(self, context: Any) -> None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LatentZoom.load(context.artifacts["bundle"], device=device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for index, request in enumerate(model_input.to_dict("records")):
            given = {str(key): value for key, value in request.items() if not _missing(value)}
            rows += [{"request": index, **row} for row in self._answer(given)]
        return pd.DataFrame(rows, columns=["request", "seed", "height", "width", "png"])

    def _answer(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        task = request.get("task")
        size: tuple[int, int] | None
        seed, steps = int(request.get("seed", 0)), int(request.get("steps", 20))
        if task == "generate":
            num = int(request.get("num", 1))
            if num > MAX_PICTURES:
                raise UserError(f"num = {num} is not allowed; use at most {MAX_PICTURES} a request")
            default = self.model.config.image_size
            size = (int(request.get("height", default)), int(request.get("width", default)))
            pictures = self.model.generate(num=num, size=size, seed=seed, num_steps=steps)
        elif task == "upscale":
            if "image" not in request:
                raise UserError("task 'upscale' needs a column `image`: a PNG or JPEG in base64")
            picture = decode_picture(request["image"])
            size = (int(request["height"]), int(request["width"])) if {"height", "width"} <= set(request) else None
            scale = float(request["scale"]) if "scale" in request else None
            pictures = [self.model.upscale(picture, scale, size=size, seed=seed, num_steps=steps)]
        else:
            raise UserError(f"task = {task!r} is not allowed; use 'generate' or 'upscale'")
        return [
            {"seed": seed + i, "height": p.height, "width": p.width, "png": encode_png(p)}
            for i, p in enumerate(pictures)
        ]


def decode_picture(text: str) -> Image.Image:
    """Base64 PNG or JPEG → RGB picture; the size is checked before anything is decoded."""
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG"))
        if picture.width * picture.height > MAX_INPUT_PIXELS:
            raise UserError(f"the image has {picture.height}x{picture.width} pixels; at most {MAX_INPUT_PIXELS}")
        picture.load()
    except UserError:
        raise
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"`image` is not a base64 PNG or JPEG: {error}") from error
    return picture


def encode_png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


mlflow.models.set_model(ServedModel())
