"""What a source is: a list of image ids and a way to read one. Everything else about images is not its business."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import UserError
from pipeline.formats import PICTURE_SUFFIXES

if TYPE_CHECKING:
    from preprocess.sources.listing import Listing

_HEIF = (".heic", ".heif", ".hif") if find_spec("pillow_heif") else ()
IMAGE_SUFFIXES = (*PICTURE_SUFFIXES, ".mpo", *_HEIF)
"""Of formats that `pipeline.reading` reads; HEIC where the package pillow-heif is installed."""
RARE_SUFFIXES = (".jp2", ".j2k", ".tga")
"""Of formats that are read where `--members` names them."""


def suffixes_for(members: tuple[str, ...]) -> tuple[str, ...]:
    """Suffixes of images, with the rare ones that `members` asks for."""
    asked = tuple("." + member.lower().lstrip(".").rpartition(".")[2] for member in members)
    return (*IMAGE_SUFFIXES, *(suffix for suffix in RARE_SUFFIXES if suffix in asked))


class Source(Protocol):
    """Images under ids. Sources are picklable and open their files on first use, so that workers can carry them."""

    def list_images(self) -> list[tuple[str, int]]:
        """(id, bytes) of every image; -1 where the size is unknown. Any order."""
        ...

    def left_out(self) -> dict[str, int]:
        """What the last `list_images` found and left out: number by kind. With the list it makes up all files."""
        ...

    def read(self, image: str) -> bytes:
        """The encoded image. A missing one raises `FileNotFoundError`; one that can never be read `Reject` or an
        `OSError` such as `PermissionError`; passing trouble another `OSError`."""
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

    _left_out: dict[str, int] | None = None

    def left_out(self) -> dict[str, int]:
        return dict(self._left_out or {})

    def _take(self, listing: Listing, where: str) -> list[tuple[str, int]]:
        """The images of a listing; what it left out is remembered. None at all raises `UserError`."""
        from preprocess.sources.listing import said

        self._left_out = dict(listing.left_out)
        if not listing.images:
            others = f"; left out: {said(listing.left_out)}" if listing.left_out else ""
            raise UserError(f"{where} holds no images ({', '.join(IMAGE_SUFFIXES)}){others}")
        return listing.images

    def split_of(self, image: str) -> str | None:
        return None

    def info(self, image: str) -> dict[str, Any]:
        return {}

    def aliases(self, image: str) -> list[str]:
        return []

    def check(self, image: str, data: bytes) -> str | None:
        return None
