"""What `latentzoom export` can be asked for. Light, so that its help comes at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pipeline.command_line import Flag, plain_help
from pipeline.errors import UserError


@plain_help
@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A model for others to use: a folder for the Hugging Face hub, a diffusers pipeline, or ONNX files. `latentzoom
    import` reads all of them back."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A bundle, which is a folder or URL that `latentzoom train`, `import` or `demo` made; a registered model,
    models:/NAME@champion (`latentzoom register`); starter:faithful or starter:sharp."""
    to: Annotated[Literal["hub-folder", "diffusers", "onnx"], tyro.conf.arg(metavar="hub-folder|diffusers|onnx")]
    """hub-folder: the bundle with a card that the Hugging Face hub reads, to upload as it is. diffusers: a pipeline
    folder with its own pipeline file, for DiffusionPipeline.from_pretrained. onnx: encoder and implicit decoder, of any
    size, checked against PyTorch (needs the extra export)."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Where it goes (path or URL): a new folder, or an empty one."""
    overwrite: Flag = False
    """Replace what an earlier export wrote there."""
    licence: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Of the weights, for the card: an SPDX name such as CC-BY-SA-4.0; without it the one that the bundle names."""
    report: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """A report.json of `latentzoom evaluate` on this bundle, whose figures go into the card; without it those given at
    registration, and the starter's own."""
    tracking_uri: Annotated[str, tyro.conf.arg(metavar="URI")] = ""
    """MLflow store for models:/ addresses; without it MLFLOW_TRACKING_URI."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9.+_-]*", self.licence):
            raise UserError(
                f"--licence {self.licence!r} is not allowed; use an identifier as the hub and SPDX have them, such as "
                "Apache-2.0 or CC-BY-SA-4.0 (or other)"
            )
