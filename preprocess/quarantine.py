"""`DEST/quarantine`: copies of the images that were rejected, for somebody to look at."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.retry import Retries
from pipeline.storage import join, list_folder, sha256_bytes, write_bytes
from preprocess.config import PreprocessConfig
from preprocess.pictures.reading import read_image
from preprocess.rejects import Reject
from preprocess.retry import RetryCounter, with_retries
from preprocess.sources.base import Source

_FOLDER = "quarantine"
_NAME_BYTES = 80


def quarantine_name(image: str) -> str:
    """A file name for any id: a hash that tells equal names apart, and the end of the id's own name, cut to what file
    systems take (they count bytes)."""
    end = image.rsplit("/", 1)[-1].encode()[-_NAME_BYTES:].decode(errors="ignore")
    return f"{sha256_bytes(image.encode())[:16]}-{end}"


def quarantine(config: PreprocessConfig, image: str, data: bytes, counter: RetryCounter) -> None:
    """Copy a rejected image."""
    url = join(config.dest, _FOLDER, quarantine_name(image))
    write_bytes(url, data, retries=Retries(config.retries, counter))


def fill(config: PreprocessConfig, source: Source, images: Iterable[str], counter: RetryCounter) -> None:
    """Copy those of the rejected `images` that are not in the quarantine: an earlier run may only have skipped them."""
    url = join(config.dest, _FOLDER)
    present = set(with_retries(lambda: list_folder(url), f"listing {url}", config.retries, counter))
    for image in images:
        if quarantine_name(image) in present:
            continue
        try:
            data = read_image(source, image, config.retries, counter)
        except Reject:
            continue
        if data:
            quarantine(config, image, data, counter)
