"""The starter: two small bundles for super-resolution inside the package. Their cards say how they were made."""

from __future__ import annotations

import typing
from importlib import resources
from pathlib import Path
from typing import Literal

from pipeline.common_options import did_you_mean
from pipeline.errors import UserError

Look = Literal["faithful", "sharp"]
LOOKS: tuple[Look, ...] = typing.get_args(Look)


def starter_path(look: str = "faithful") -> str:
    """The folder of the bundle for a look. `UserError` for an unknown look or where the files are missing."""
    if look not in LOOKS:
        raise UserError(f"look {look!r} is not known; use {' or '.join(LOOKS)}{did_you_mean(look, LOOKS)}")
    folder = Path(str(resources.files("pipeline"))) / "weights" / f"starter-{look}"
    for name in ("config.json", "autoencoder.safetensors", "decoder.safetensors"):
        if not (folder / name).is_file():
            raise UserError(
                f"the starter model is missing from {folder} (no {name}): the installation is damaged; install "
                "latentzoom again"
            )
    return str(folder)


def starter_or(uri: str) -> str:
    """The starter's folder for "starter" and "starter:LOOK"; any other model address as it is."""
    if uri == "starter" or uri.startswith("starter:"):
        return starter_path(uri.partition(":")[2] or LOOKS[0])
    return uri
