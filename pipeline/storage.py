"""Local folders and object stores through one set of functions (fsspec URLs: /path, s3://bucket/key, memory://...).

Publishing is atomic: a name holds either the whole content or nothing. Locally that is a temporary file beside the
target, fsync and rename; on object stores one completed upload (aborted, never committed, on an exception).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import UserError

_CHUNK = 8 << 20


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path in it. Unknown schemes raise `UserError`."""
    try:
        fs, path = fsspec.core.url_to_fs(str(url))
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot use {url}: {error}") from error
    return fs, path


def is_local(url: str) -> bool:
    return isinstance(filesystem(url)[0], LocalFileSystem)


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended. Parts may not leave the folder."""
    for part in parts:
        if part.startswith("/") or ".." in part.split("/"):
            raise UserError(f"{part!r} would leave the folder {url}")
    return "/".join([str(url).rstrip("/") or "/", *parts])


def absolute(url: str) -> str:
    """Local paths made absolute; other URLs unchanged. Workers of a cluster have another working folder."""
    fs, path = filesystem(url)
    return str(Path(path).resolve()) if isinstance(fs, LocalFileSystem) else str(url)


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    fs, path = filesystem(url)
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError as error:
        raise UserError(f"no such file: {url}") from error
    except NotADirectoryError as error:
        raise UserError(f"no such file: {url}; a part of its path is a file") from error
    except IsADirectoryError as error:
        raise UserError(f"{url} is a folder; give a file") from error


def read_json(url: str) -> Any:
    try:
        return json.loads(read_bytes(url))
    except json.JSONDecodeError as error:
        raise UserError(f"{url} is not valid JSON ({error}); it may be damaged") from error


def write_bytes(url: str, data: bytes) -> None:
    """Publish `data` under `url` atomically."""
    with _temporary_file(url) as (file, name):
        file.write(data)
    publish_file(name, url)


def write_json(url: str, value: Any) -> None:
    """Publish `value` as indented JSON with sorted keys, atomically."""
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def publish_file(local_path: str | Path, url: str) -> None:
    """Move the local file to `url` so that `url` never shows a part of it; the local file is gone afterwards."""
    fs, path = filesystem(url)
    local_path = Path(local_path)
    try:
        if isinstance(fs, LocalFileSystem):
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                try:
                    local_path.replace(temporary)
                except OSError:
                    shutil.copyfile(local_path, temporary)
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                temporary.chmod(0o644)
                temporary.replace(target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            _fsync_dir(target.parent)
        else:
            with open(local_path, "rb") as source:
                target_file = fs.open(path, "wb")
                try:
                    shutil.copyfileobj(source, target_file, _CHUNK)
                except BaseException:
                    target_file.discard()
                    raise
                target_file.close()
    finally:
        with contextlib.suppress(FileNotFoundError):
            local_path.unlink()


def publish_dir(local_dir: str | Path, url: str, last: str | None = None) -> None:
    """Copy every file under `local_dir` to `url`, atomically one by one; `last` (a relative name) is written last."""
    local_dir = Path(local_dir)
    names = sorted(p.relative_to(local_dir).as_posix() for p in local_dir.rglob("*") if p.is_file())
    for name in sorted(names, key=lambda n: n == last):
        with _temporary_file(url) as (file, temporary), open(local_dir / name, "rb") as source:
            shutil.copyfileobj(source, file, _CHUNK)
        publish_file(temporary, join(url, name))


def list_files(url: str) -> list[str]:
    """Relative names of all files under `url`, sorted. Empty when the folder does not exist."""
    fs, path = filesystem(url)
    if not fs.exists(path):
        return []
    root = fs._strip_protocol(path).rstrip("/")
    return sorted(str(name)[len(root) + 1 :] for name in fs.find(path))


def remove_tree(url: str) -> None:
    """Delete a folder and all in it; nothing happens when it does not exist."""
    fs, path = filesystem(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def fetch_dir(url: str, local_dir: str | Path) -> Path:
    """A local copy of a remote folder; a local folder is returned as it is."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    local_dir = Path(local_dir)
    for name in list_files(url):
        target = local_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(join(path, name), str(target))
    return local_dir


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(url: str) -> str:
    fs, path = filesystem(url)
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _temporary_file(url: str) -> Iterator[tuple[BinaryIO, str]]:
    """A file (and its name) to fill and then publish under `url`. It is deleted when filling it fails."""
    folder = _scratch_dir(url)
    try:
        handle, name = tempfile.mkstemp(prefix="latentzoom-", dir=folder)
    except FileNotFoundError as error:  # in /proc and its like nothing can be made, and nowhere a temporary file
        where = folder or "any temporary folder"
        raise UserError(f"cannot write to {where}: {error.strerror}; choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, name
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _scratch_dir(url: str) -> str | None:
    """Local targets get their temporary file in the target's nearest existing folder, so that rename is atomic."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        return None
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: permission denied; choose another folder")
    return str(folder)


def _fsync_dir(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
