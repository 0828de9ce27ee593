"""Images in existing tar files (WebDataset or any other). Members are read in place; nothing is unpacked.

Id: `name of the tar/name of the member`. Braces are expanded as the webdataset library does; its `pipe:` addresses,
which run programs, are refused.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from typing import BinaryIO

from pipeline.errors import UserError, first_line
from pipeline.storage import filesystem, reaching
from preprocess.config import PreprocessConfig
from preprocess.sources.base import PlainSource, suffixes_for
from preprocess.sources.listing import Listing, choose, kind_left_out, list_folder

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20


class WebDatasetSource(PlainSource):
    """One tar, a range of tars (`shards-{000000..000099}.tar`), or all tars in a folder. Listing scans the member
    headers once; reading fetches one byte range. members: extensions to take, by default every image of a sample."""

    def __init__(self, url: str, members: tuple[str, ...] = ()) -> None:
        self.url, self.members = url, members
        self.places: dict[
            str, tuple[str, int, int, int]
        ] = {}  # id → (tar's path, offset, length, start of member's name)

    def list_images(self) -> list[tuple[str, int]]:
        paths, left_out = self._tars()
        self.places = {}
        listing = Listing(left_out=Counter(left_out))
        for name, path in sorted(paths.items()):
            found = choose(self._scan(name, path), self.members, is_tar=True)
            listing.images += found.images
            listing.left_out += found.left_out
        return self._take(listing, self.url)

    def _tars(self) -> tuple[dict[str, str], dict[str, int]]:
        """Name → path of every tar, and what else a folder holds."""
        fs, root = filesystem(self.url)
        if not fs.isdir(root.rstrip("/") or "/"):
            expanded = _expanded(root)
            names = [path.rsplit("/", 1)[-1] for path in expanded]
            if len(set(names)) < len(names):
                raise UserError(f"{self.url} names a tar twice; ids must be unique")
            missing = [path for path in expanded if not fs.exists(path)]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise UserError(f"no such tar file: {missing[0]}{more}")
            return dict(zip(names, expanded)), {}
        listing = list_folder(self.url, (".tar",))
        if not listing.images:
            raise UserError(f"{self.url} holds no .tar files (compressed ones must be unpacked: they cannot be sought)")
        return {name: f"{root.rstrip('/')}/{name}" for name, _ in listing.images}, dict(listing.left_out)

    def _scan(self, name: str, path: str) -> Listing:
        fs, _ = filesystem(self.url)
        listing, seen = Listing(), dict[str, int]()
        try:
            with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.name.startswith("/") or ".." in member.name.split("/"):
                        raise UserError(f"{name}: member {member.name!r} points outside the archive; refusing the file")
                    if member.isdir():
                        continue
                    plain = member.name.removeprefix("./")
                    kind = kind_left_out(plain, suffixes_for(self.members))
                    if not member.isreg() or member.issparse():
                        kind = kind or "links and special files in tars"
                    if kind:
                        listing.left_out[kind] += 1
                        continue
                    image = f"{name}/{plain}"
                    if seen.setdefault(image, member.offset_data) != member.offset_data:
                        raise UserError(f"{name} holds {member.name!r} twice; ids must be unique")
                    self.places[image] = (path, member.offset_data, member.size, len(name) + 1)
                    listing.images.append((image, member.size))
                _check_end(file, tar.offset, name)
        except (tarfile.TarError, FileNotFoundError, EOFError) as error:
            raise UserError(f"{name} is not a readable tar file: {first_line(error)}") from error
        return listing

    def read(self, image: str) -> bytes:
        path, offset, length, _ = self.places[image]
        fs, _ = filesystem(self.url)
        if not length:
            return b""
        with reaching(self.url):
            return bytes(fs.cat_file(path, start=offset, end=offset + length))

    def aliases(self, image: str) -> list[str]:
        """The member's own name, as lists made beside the tars have it."""
        return [image[self.places[image][3] :]]


def _expanded(url: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if url.startswith("pipe:") or "/pipe:" in url:
        raise UserError(f"{url}: pipes run programs and are not read; give the tar files")
    try:
        return list(expand_urls(url)) if "{" in url else [url]
    except ValueError as error:
        raise UserError(f"{url}: the braces do not fit ({first_line(error)})") from error


def _check_end(file: BinaryIO, end: int, name: str) -> None:
    """A tar ends in zeros. One that was cut between two members has none, and its tail would be lost unnoticed; nor
    does one whose next header is damaged, or to which another tar was appended."""
    file.seek(end)
    length = 0
    while chunk := file.read(_CHUNK):
        length += len(chunk)
        if chunk.strip(b"\0"):
            raise UserError(f"{name} holds more after its last readable member: it is damaged, or tars were joined")
    if length < 2 * _BLOCK:
        raise UserError(f"{name} has no end marker: the file was cut; fetch or write it again")


def open_webdataset(config: PreprocessConfig) -> WebDatasetSource:
    """`webdataset`: existing tars of images."""
    return WebDatasetSource(config.source_url, config.members)
