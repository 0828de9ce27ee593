"""The one careful reader of pictures: what a viewer shows, from any file, whoever asks for it."""

from __future__ import annotations

from pipeline.reading.decode import decode, oriented_size
from pipeline.reading.header import Unreadable, use_own_size_limit
from pipeline.reading.picture import Picture
from pipeline.reading.source import MAX_INPUT_PIXELS, PictureSource, read_picture

__all__ = [
    "MAX_INPUT_PIXELS",
    "Picture",
    "PictureSource",
    "Unreadable",
    "decode",
    "oriented_size",
    "read_picture",
    "use_own_size_limit",
]
