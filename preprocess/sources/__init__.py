"""The table of sources. A new one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import UserError
from preprocess.config import PreprocessConfig
from preprocess.sources.base import Source
from preprocess.sources.folder import open_folder

SOURCES: dict[str, tuple[Callable[[PreprocessConfig], Source], str]] = {
    "folder": (open_folder, "any images in a folder, recursively"),
}


def open_source(config: PreprocessConfig) -> Source:
    """The source that `config` names."""
    if config.source not in SOURCES:
        raise UserError(f"unknown source {config.source!r}; known: {', '.join(SOURCES)}")
    return SOURCES[config.source][0](config)
