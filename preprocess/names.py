"""Names of images as people write them: in split lists, in --val-folder. The one place that brings them into the form
of ids, which are paths within the source with forward slashes.

Lists come as UTF-8 or UTF-16, with or without a byte order mark, from Windows or Unix, as `find` prints them
(`./a.jpg`), as absolute paths or URLs under the source, and with composed letters (NFC) for files whose names are
decomposed (NFD).
"""

from __future__ import annotations

import codecs
import functools
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable

from pipeline.errors import UserError
from pipeline.storage import is_local, read_bytes
from preprocess.retry import PATIENT

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_list(url: str) -> list[tuple[int, str]]:
    """(line number, text) of a split list, blank lines left out."""
    data = read_bytes(url, retries=PATIENT)
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{url}, line {line}: not a text of ids in UTF-8 ({error.reason}); save it as UTF-8") from error
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line.strip()]


def stem(name: str) -> str:
    """A path without its suffix."""
    return posixpath.splitext(name)[0]


def composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def within(text: str, root: str) -> str:
    """`text`, a path in any of the forms above, as a path within the source at URL `root`: "" for the source itself.
    Paths outside it raise `UserError`."""
    plain = composed(text.strip()).replace("\\", "/")
    plain = plain.removeprefix("file://")
    if "://" in plain or plain.startswith("/"):
        return _below(plain, root)
    path = posixpath.normpath(plain)
    if path == ".." or path.startswith("../"):
        raise UserError(f"{text!r} lies outside the source")
    return "" if path == "." else path


def _below(path: str, root: str) -> str:
    """What follows the source in an absolute path or URL; links on the way to the source make no difference."""
    root = composed(root).rstrip("/")
    path = path if "://" in path else posixpath.normpath(path)
    if path.rstrip("/") == root:
        return ""
    if path.startswith(root + "/"):
        return path[len(root) + 1 :].rstrip("/")
    if "://" not in path and is_local(root):
        folder = posixpath.dirname(path)
        while folder not in ("", "/"):
            if _real(folder) == _real(root):
                return path[len(folder) + 1 :]
            folder = posixpath.dirname(folder)
    raise UserError(f"{path!r} lies outside the source {root}")


@functools.lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return composed(os.path.realpath(folder))


class NameIndex:
    """Finds the images of a source by the names that lists use.

    A name with a folder is a path within the source (or within the folder that holds the source), with or without its
    suffix. Only a name without a folder may be the bare name of a file that lies anywhere. aliases: further names.
    """

    def __init__(self, images: Iterable[str], root: str, aliases: Callable[[str], list[str]]) -> None:
        self.root, self.base = root, composed(posixpath.basename(root.rstrip("/")))
        self.ids = set(images)
        self._paths, self._path_stems, self._bare, self._bare_stems = (dict[str, str | None]() for _ in range(4))
        for image in sorted(self.ids):
            names = {composed(name) for name in (image, *aliases(image))}
            bare = {posixpath.basename(name) for name in names}
            for table, entries in (
                (self._paths, names),
                (self._path_stems, {stem(name) for name in names}),
                (self._bare, bare),
                (self._bare_stems, {stem(name) for name in bare}),
            ):
                for name in entries:
                    table[name] = image if table.get(name, image) == image else None

    def find(self, text: str) -> str:
        """The image that a line of a list names. None or several raise `UserError`."""
        for exact in (text, text.strip()):
            if exact in self.ids:
                return exact
        path = within(text, self.root)
        paths = [path, path.removeprefix(self.base + "/")] if self.base else [path]
        tables = [(self._paths, paths), (self._path_stems, paths), (self._path_stems, [stem(p) for p in paths])]
        if not {"/", "\\"} & set(text.strip()):
            tables += [(self._bare, [path]), (self._bare_stems, [path, stem(path)])]
        for table, names in tables:
            for name in names:
                if name in table:
                    found = table[name]
                    if found is None:
                        raise UserError(f"{text.strip()!r} names more than one image; use paths within the source")
                    return found
        raise UserError(f"{text.strip()!r} is not in the source")

    def find_all(self, url: str) -> set[str]:
        """The images that the list at `url` names. A line that cannot be used raises `UserError` with its number."""
        found = set()
        for number, line in read_list(url):
            try:
                found.add(self.find(line))
            except UserError as error:
                raise UserError(f"{url}, line {number}: {error}") from error
        return found
