"""What a file is by its first bytes, whatever its name says.

Weights reach people by many ways, and some of them leave something else under the right name: the pointer of a Git
repository whose large files were not fetched, the web page of a login, a download that was cut short.
"""

from __future__ import annotations

from typing import Literal

from pipeline import storage
from pipeline.errors import UserError

Format = Literal["safetensors", "zip", "pickle", "json", "yaml"]
_HEAD = 1024
_OTHERS = (
    (b"\x1f\x8b", "a gzip file; unpack it first"),
    (b"BZh", "a bzip2 file; unpack it first"),
    (b"\xfd7zXZ", "an xz file; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"GGUF", "a GGUF file of a language-model runtime, which is not read here"),
    (b"\x89HDF", "an HDF5 file (Keras), which is not read here"),
    (b"\x93NUMPY", "a NumPy array, not a set of named weights"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
)


def format_of(url: str) -> Format:
    """How the weights (or configuration) in the file are kept. `UserError` naming what it is instead."""
    head = storage.read_head(url, _HEAD)
    if words := impostor(head):
        raise UserError(f"{url} is {words}")
    for magic, words in _OTHERS:
        if head.startswith(magic):
            raise UserError(f"{url} is {words}")
    if head[257:262] == b"ustar":
        raise UserError(f"{url} is a tar archive; unpack it first")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if _is_safetensors(head):
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    return "json" if head.lstrip()[:1] in (b"{", b"[") else "yaml"


def impostor(head: bytes) -> str:
    """In words, what stands in the place of a file that was never fetched; "" for anything else. head: first bytes."""
    if not head:
        return "empty (0 bytes); download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned, or download the file"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<!--", b"<?xml")):
        return "a web page, not the file itself (a login, or an error?); download it again from its own link"
    return ""


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes that give the length of the JSON object after them."""
    return len(head) > 9 and 2 <= int.from_bytes(head[:8], "little") <= 1 << 30 and head[8:9] == b"{"
