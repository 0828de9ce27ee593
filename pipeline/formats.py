"""Picture formats by name: which files are read from folders, and what is written under which suffix.

Imports nothing heavy, so that a command's arguments are judged at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from pipeline.errors import UserError
from pipeline.sizes import Size

PICTURE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".avifs", ".bmp", ".dib", ".tif", ".tiff",
    ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
"""Names of files that are taken for pictures in a folder. What a file is, its content decides."""


def is_picture_name(name: str) -> bool:
    """Whether a file (path or URL) is taken for a picture by its name. What macOS adds, ._NAME, is none."""
    return suffix_of(name) in PICTURE_SUFFIXES and not name.rsplit("/", 1)[-1].startswith("._")


@dataclass(frozen=True, kw_only=True)
class Format:
    """max_side: pixels. in_parts: written window by window in bounded memory; others are held whole."""

    name: str
    max_side: int
    has_alpha: bool = True
    in_parts: bool = False
    is_lossy: bool = False


PNG = Format(name="PNG", max_side=2**31 - 1, in_parts=True)
TIFF = Format(name="TIFF", max_side=2**31 - 1, in_parts=True)
JPEG = Format(name="JPEG", max_side=65500, has_alpha=False, is_lossy=True)
WEBP = Format(name="WebP", max_side=16383, is_lossy=True)
AVIF = Format(name="AVIF", max_side=65536, is_lossy=True)
MAX_WHOLE_PIXELS = 1 << 28
"""Of formats that are not written in parts."""

FORMATS = {
    ".png": PNG, ".tif": TIFF, ".tiff": TIFF, ".jpg": JPEG, ".jpeg": JPEG, ".jpe": JPEG, ".jfif": JPEG,
    ".webp": WEBP, ".avif": AVIF,
}  # fmt: skip
"""What is written, by suffix."""
WRITTEN = ".png, .tif, .jpg, .webp or .avif"


def suffix_of(name: str) -> str:
    """The suffix of a path or URL in lower case, without what a URL says behind `?` or `#`."""
    path = name.split("?")[0].split("#")[0] if "://" in name else name
    return PurePosixPath(path).suffix.lower()


def format_of(target: str, size: Size = (1, 1)) -> Format:
    """The format that `target` (path or URL) is written in. `UserError` for a suffix that is none of ours, and for
    sizes that the format cannot hold."""
    form = FORMATS.get(suffix_of(target))
    if form is None:
        raise UserError(f"{target}: write a {WRITTEN} file")
    if max(size) > form.max_side:
        raise UserError(f"{target}: {form.name} holds at most {form.max_side} pixels a side; write a .png or .tif file")
    if not form.in_parts and size[0] * size[1] > MAX_WHOLE_PIXELS:
        raise UserError(
            f"{target}: {form.name} is written at once, with at most {MAX_WHOLE_PIXELS} pixels; "
            "write a .png or .tif file"
        )
    return form


def own_suffix(source: str, head: bytes = b"") -> str:
    """The suffix for the result of a picture: its own format where we write that, PNG otherwise. head: the file's first
    bytes, which say it where the name has no suffix."""
    suffix = suffix_of(source)
    if suffix in FORMATS:
        return suffix
    return ".png" if suffix in PICTURE_SUFFIXES else _suffix_by_content(head)


def _suffix_by_content(head: bytes) -> str:
    if head.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    return ".tif" if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else ".png"


_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_NETPBM = tuple(b"P%d" % kind for kind in range(1, 7))


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins so is a picture that can be read."""
    is_netpbm = head[:2] in _NETPBM and head[2:3] in b" \t\r\n#" and len(head) > 2
    is_container = head[4:12] in (b"ftypavif", b"ftypavis") or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    return head.startswith(_MAGIC) or is_netpbm or is_container
