"""What a source is: a list of image ids and a way to read one. Everything else about images is not its business."""

from __future__ import annotations

from typing import Any, Protocol

from pipeline.errors import UserError
from pipeline.formats import PICTURE_SUFFIXES
from preprocess.store import read_bytes

IMAGE_SUFFIXES = PICTURE_SUFFIXES


class Source(Protocol):
    """Images under ids. Sources are picklable and open their files on first use, so that workers can carry them."""

    def list_images(self) -> list[tuple[str, int]]:
        """(id, bytes) of every image; -1 where the size is unknown. Any order."""
        ...

    def read(self, image: str) -> bytes:
        """The encoded image. A missing one raises `FileNotFoundError`; passing trouble raises `OSError`."""
        ...

    def split_of(self, image: str) -> str | None:
        """The split that the source itself puts the image in, or None when it has no opinion."""
        ...

    def info(self, image: str) -> dict[str, Any]:
        """Facts for the sample's JSON: licence, author. Empty when the source has none."""
        ...

    def aliases(self, image: str) -> list[str]:
        """Other names that split lists use for the image, besides its id and file name."""
        ...

    def check(self, image: str, data: bytes) -> str | None:
        """Why `data` is not the image that the source promised (a checksum, say), or None."""
        ...


class PlainSource:
    """Defaults for sources without splits, facts or checksums."""

    def split_of(self, image: str) -> str | None:
        return None

    def info(self, image: str) -> dict[str, Any]:
        return {}

    def aliases(self, image: str) -> list[str]:
        return []

    def check(self, image: str, data: bytes) -> str | None:
        return None


def read_list(url: str) -> list[str]:
    """Lines of a split list, blanks left out."""
    try:
        lines = read_bytes(url).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{url} is not a text file of ids ({error})") from error
    return [line.strip() for line in lines if line.strip()]
