"""Images in existing tar files (WebDataset or any other). Members are read in place; nothing is unpacked.

Id: `name of the tar/name of the member`.
"""

from __future__ import annotations

import tarfile

from pipeline.errors import UserError
from pipeline.storage import filesystem
from preprocess.config import PreprocessConfig
from preprocess.sources.base import PlainSource
from preprocess.sources.folder import is_image_name


class WebDatasetSource(PlainSource):
    """One tar, or all tars in a folder. Listing scans the member headers once; reading fetches one byte range."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.places: dict[str, tuple[str, int, int]] = {}  # id → (path of the tar, offset, length)

    def list_images(self) -> list[tuple[str, int]]:
        fs, root = filesystem(self.url)
        if root.lower().endswith(".tar"):
            paths = {root.rsplit("/", 1)[-1]: root}
        else:
            base = root.rstrip("/")
            paths = {str(p)[len(base) + 1 :]: str(p) for p in fs.find(base) if str(p).lower().endswith(".tar")}
        if not paths:
            raise UserError(f"{self.url} holds no .tar files (compressed ones must be unpacked: they cannot be sought)")
        for name, path in sorted(paths.items()):
            self._scan(name, path)
        if not self.places:
            raise UserError(f"{self.url}: the tar files hold no images")
        return [(image, length) for image, (_, _, length) in self.places.items()]

    def _scan(self, name: str, path: str) -> None:
        fs, _ = filesystem(self.url)
        try:
            with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.name.startswith("/") or ".." in member.name.split("/"):
                        raise UserError(f"{name}: member {member.name!r} points outside the archive; refusing the file")
                    if not member.isreg() or not is_image_name(member.name):
                        continue
                    image = f"{name}/{member.name}"
                    if image in self.places and self.places[image][1] != member.offset_data:
                        raise UserError(f"{name} holds {member.name!r} twice; ids must be unique")
                    self.places[image] = (path, member.offset_data, member.size)
        except (tarfile.TarError, FileNotFoundError, EOFError) as error:
            raise UserError(f"{name} is not a readable tar file: {error}") from error

    def read(self, image: str) -> bytes:
        path, offset, length = self.places[image]
        fs, _ = filesystem(self.url)
        return bytes(fs.cat_file(path, start=offset, end=offset + length)) if length else b""


def open_webdataset(config: PreprocessConfig) -> WebDatasetSource:
    """`webdataset`: existing tars of images."""
    return WebDatasetSource(config.source_url)
