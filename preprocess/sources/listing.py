"""What a source holds and what of it is left out, by kind and number, so that its counts close: every file is an image
of the list or counted under a kind such as ".txt" or "NAS thumbnails". One set of rules for folders, zips and tars.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import UserError
from pipeline.kinds import said as said
from pipeline.storage import filesystem
from preprocess.sources.base import IMAGE_SUFFIXES

_KIND_OF_PART = {
    **dict.fromkeys(("@eadir", ".@__thumb", ".thumbnails", "thumbs.db"), "NAS thumbnails"),
    **dict.fromkeys(("#recycle", "@recycle", "$recycle.bin", ".trash", ".trashes"), "in a recycle bin"),
    **dict.fromkeys(("#snapshot", ".snapshot", ".snapshots", "@recently-snapshot"), "in a snapshot"),
    "__macosx": "macOS extras",
    "lost+found": "in lost+found",
}
_ANNOTATIONS = re.compile(r"masks?|seg(mentation)?|labels?|depth|normals?|alpha|matte", re.IGNORECASE)
_SHARD_SET = frozenset({"plan.json", "sources.txt.gz"})
OWN = "of shard sets"
NOT_CHOSEN = "not in --members"


@dataclass
class Listing:
    """images: (id, bytes) each, -1 where the size is unknown. left_out: number of files (or linked folders) by kind."""

    images: list[tuple[str, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def kind_left_out(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> str | None:
    """Why a file is no image, judged by its path within the source; None for an image."""
    for part in name.split("/"):
        if kind := _KIND_OF_PART.get(part.lower()):
            return kind
    folder, _, base = name.rpartition("/")
    if base.startswith("._"):
        return "macOS extras"
    if base.startswith(".") or folder.startswith(".") or "/." in folder:
        return "hidden"
    if base.lower().endswith(suffixes):
        return None
    suffix = posixpath.splitext(base)[1].lower()
    if not suffix:
        return "without suffix"
    return suffix if re.fullmatch(r"\.(?=.*[a-z])[a-z0-9]{1,8}", suffix) else "other files"


def extension(name: str) -> tuple[str, str]:
    """(key, extension) of a member as WebDataset has them: the base name is split at its first dot."""
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(name)
    return (key, suffix.lower()) if key else (name, "")


def choose(listing: Listing, members: tuple[str, ...], is_tar: bool) -> Listing:
    """Leave out what --members does not name and the annotations of other images: `0.mask.png` beside `0.jpg`. In
    tars, where `0` is one sample, that is any longer extension; elsewhere the usual words, as `me.edit.jpg` is one."""
    wanted = {member.lower().lstrip(".") for member in members}
    keys = {posixpath.splitext(name)[0] for name, _ in listing.images}
    chosen = Listing(left_out=Counter(listing.left_out))
    for name, size in listing.images:
        key, whole = extension(name)
        last = whole.rpartition(".")[2]
        middle = whole[: -len(last) - 1]
        if wanted and not wanted & {whole, last}:
            chosen.left_out[NOT_CHOSEN] += 1
        elif whole not in wanted and key in keys and middle and (is_tar or _ANNOTATIONS.fullmatch(middle)):
            chosen.left_out[f".{middle}.{last} beside an image"] += 1
        else:
            chosen.images.append((name, size))
    return chosen


def list_folder(url: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Listing:
    """All files under a folder. A place that is no folder and folders that cannot be read raise `UserError`."""
    fs, root = filesystem(url)
    root = root.rstrip("/") or "/"
    if not fs.isdir(root):
        raise UserError(f"{url} is not a folder; give the folder that holds the images")
    if isinstance(fs, LocalFileSystem):
        return _listed(_walk(root), suffixes)
    found = fs.find(root, detail=True)
    files = [
        (str(path)[len(root) + 1 :], int(detail.get("size") or 0))
        for path, detail in found.items()
        if detail.get("type") != "directory"
    ]
    return _listed(((name, size, None) for name, size in _mark_sets(files)), suffixes)


def _listed(files: Iterable[tuple[str, int, str | None]], suffixes: tuple[str, ...]) -> Listing:
    listing = Listing()
    for name, size, kind in files:
        kind = kind or (OWN if size == _OWN_SIZE else kind_left_out(name, suffixes))
        if kind:
            listing.left_out[kind] += 1
        else:
            listing.images.append((name, size))
    return listing


_OWN_SIZE = -2


def _mark_sets(files: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Files of shard sets below a remote source get the size `_OWN_SIZE`."""
    names: dict[str, set[str]] = {}
    for name, _ in files:
        folder, _, base = name.rpartition("/")
        if base in _SHARD_SET and folder:
            names.setdefault(folder, set()).add(base)
    sets = tuple(folder + "/" for folder, found in names.items() if found == _SHARD_SET)
    for name, size in files:
        yield name, _OWN_SIZE if sets and name.startswith(sets) else size


def _walk(root: str) -> Iterator[tuple[str, int, str | None]]:
    """(name, bytes, kind where it is no file for the list) of all in a local folder. Linked folders are followed after
    the real ones, each folder once, so that links cannot lead round and round."""
    seen: set[tuple[int, int]] = set()
    unreadable: list[str] = []
    links: list[tuple[str, str]] = []
    real_root = os.path.realpath(root)
    waiting: list[tuple[str, str, str | None]] = [(root, "", None)]
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
            path, name = links.pop()
            target = os.path.realpath(path)
            if (real_root + "/").startswith(target.rstrip("/") + "/") or _identity(path) in seen:
                yield name, -1, "linked folders"
                continue
            waiting.append((path, name + "/", None))
        path, prefix, kind = waiting.pop()
        identity = _identity(path)
        if identity in seen:
            continue
        seen.add(identity)
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if kind or kind_left_out(prefix + "x.png"):
                yield prefix, -1, "unreadable " + (kind or "hidden")
            else:
                unreadable.append(f"{path} ({error.strerror})")
            continue
        if prefix and {entry.name for entry in entries} >= _SHARD_SET:
            kind = OWN
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, name + "/", kind))
                continue
            size, special = _size(entry)
            if special == _FOLDER:
                links.append((entry.path, name))
            else:
                yield name, size, kind or special
    if unreadable:
        more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        raise UserError(f"cannot read {', '.join(unreadable[:3])}{more}; mend the permissions, or move it elsewhere")


_FOLDER = "folder"


def _size(entry: os.DirEntry[str]) -> tuple[int, str | None]:
    """(bytes, what it is where it is no file). A link that leads nowhere is an image that will not be readable."""
    try:
        found = entry.stat()
    except OSError:
        return -1, None
    if stat.S_ISDIR(found.st_mode):
        return -1, _FOLDER
    return (found.st_size, None) if stat.S_ISREG(found.st_mode) else (-1, "special files")


def _identity(path: str) -> tuple[int, int]:
    try:
        found = Path(path).stat()
    except OSError as error:
        if error.errno == errno.ENOENT:
            return (-1, hash(path))
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return found.st_dev, found.st_ino


def is_folder(url: str) -> bool:
    """Whether there is a folder at `url`, whatever its name ends in."""
    fs, path = filesystem(url)
    return bool(fs.isdir(path.rstrip("/") or "/"))


def is_archive(url: str) -> bool:
    """Whether `url` is a zip file: by its suffix, or for a local file by its content."""
    if url.lower().endswith(".zip"):
        return True
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem) or not Path(path).is_file():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"cannot read {url}: {error.strerror}") from error
