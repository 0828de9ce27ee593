"""Local folders and object stores through one set of functions (fsspec URLs: /path, s3://bucket/key, memory://...).

`retries` of a function: it is tried again when the store fails for a passing reason (`pipeline.retry`).

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

from pipeline.errors import Missing, UserError, first_line
from pipeline.file_systems import absolute as absolute
from pipeline.file_systems import filesystem as filesystem
from pipeline.file_systems import is_absent
from pipeline.file_systems import is_local as is_local
from pipeline.file_systems import join as join
from pipeline.file_systems import reaching as reaching
from pipeline.retry import ONCE, Retries

_CHUNK = 8 << 20


def cache_folder() -> Path:
    """Of this user: LATENTZOOM_CACHE, else ~/.cache/latentzoom."""
    return Path(os.environ.get("LATENTZOOM_CACHE") or Path.home() / ".cache" / "latentzoom")


def exists(url: str, *, retries: Retries = ONCE) -> bool:
    def look() -> bool:
        fs, path = filesystem(url)
        with reaching(url):
            is_there = bool(fs.exists(path))
            if not is_there:
                _raise_if_silent(fs, path)
            return is_there

    return retries(look, f"looking for {url}")


def _raise_if_silent(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Raise where a web server does not answer, or refuses: fsspec takes both for "not there"."""
    if "http" not in fs.protocol:
        return
    try:
        fs.cat_file(path, start=0, end=1)
    except FileNotFoundError:
        return
    except Exception as error:
        if not is_absent(error):
            raise


def read_bytes(url: str, *, retries: Retries = ONCE) -> bytes:
    return retries(lambda: _read_bytes(url), f"reading {url}")


def _read_bytes(url: str) -> bytes:
    fs, path = filesystem(url)
    try:
        with reaching(url):
            return bytes(fs.cat_file(path))
    except FileNotFoundError as error:
        raise Missing(f"no such file: {url}") from error
    except NotADirectoryError as error:
        raise UserError(f"no such file: {url}; a part of its path is a file") from error
    except IsADirectoryError as error:
        raise UserError(f"{url} is a folder; give a file") from error


@contextlib.contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A file to read from and to seek in."""
    fs, path = filesystem(url)
    try:
        with reaching(url), fs.open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise Missing(f"no such file: {url}") from error
    except NotADirectoryError as error:
        raise Missing(f"no such file: {url}; a part of its path is a file") from error
    except IsADirectoryError as error:
        raise UserError(f"{url} is a folder; give a file") from error


def read_head(url: str, num_bytes: int) -> bytes:
    """The first bytes of a file, fewer where it has not so many."""
    with opened(url) as file:
        return bytes(file.read(num_bytes))


def read_json(url: str, *, retries: Retries = ONCE) -> Any:
    try:
        return json.loads(read_bytes(url, retries=retries))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{url} is not valid JSON ({first_line(error)}); it may be damaged") from error


def write_bytes(url: str, data: bytes, *, retries: Retries = ONCE) -> None:
    """Publish `data` under `url` atomically."""

    def write() -> None:
        with _temporary_file(url) as (file, name):
            file.write(data)
        publish_file(name, url)

    retries(write, f"writing {url}")


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
            with reaching(url), open(local_path, "rb") as source:
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


def replace_dir(local_dir: str | Path, url: str, last: str) -> None:
    """Copy the files under `local_dir` to the folder `url` in place of all that it holds. Whoever looks finds the old
    folder, the new one, or for a moment none, but no mixture. On an object store `last` (a relative name) goes first
    and comes last: without it the folder counts as absent."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        if exists(join(url, last)):
            with reaching(url):
                fs.rm_file(fs._strip_protocol(join(url, last)))
        publish_dir(local_dir, url, last)
        return
    target = Path(path).resolve()
    fresh, old = (_beside(target, kind) for kind in ("new", "old"))
    try:
        publish_dir(local_dir, str(fresh), last)
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _fsync_dir(target.parent)
    finally:
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(url: str) -> None:
    """Delete what a `replace_dir` of `url` left behind that was killed. Nobody may be writing there."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        target = Path(path).resolve()
        for kind in ("new", "old"):
            for folder in target.parent.glob(f".{target.name}.*.{kind}"):
                shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def list_files(url: str, *, retries: Retries = ONCE) -> list[str]:
    """Relative names of all files under `url`, sorted. Empty when the folder does not exist."""

    def look() -> list[str]:
        fs, path = filesystem(url)
        if not exists(url):
            return []
        root = fs._strip_protocol(path).rstrip("/")
        with reaching(url):
            return sorted(str(name)[len(root) + 1 :] for name in fs.find(path))

    return retries(look, f"listing {url}")


def list_folder(url: str) -> list[str]:
    """Names of what lies directly in a folder, sorted. Empty when it does not exist; `UserError` for a file."""
    fs, path = filesystem(url)
    if not exists(url):
        return []
    with reaching(url):
        if fs.isfile(path):
            raise UserError(f"{url} is a file; give a folder")
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))


def remove_tree(url: str) -> None:
    """Delete a folder and all in it; nothing happens when it does not exist."""
    fs, path = filesystem(url)
    if exists(url):
        with reaching(url):
            fs.rm(path, recursive=True)


def move_tree(url: str, target: str) -> None:
    """Give a folder another place in the same store: a rename where it is local, else copied and then deleted."""
    fs, path = filesystem(url)
    _, place = filesystem(target)
    with reaching(url):
        if isinstance(fs, LocalFileSystem):
            Path(path).rename(place)
        else:
            fs.mv(path, place, recursive=True)


def fetch_dir(url: str, local_dir: str | Path) -> Path:
    """A local copy of a remote folder; a local folder is returned as it is."""
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    local_dir = Path(local_dir)
    for name in list_files(url):
        target = local_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with reaching(url):
            fs.get_file(join(path, name), str(target))
    return local_dir


def fetch_file(url: str, target: str | Path) -> None:
    """Copy one file, which may be larger than memory, to the local `target`."""
    fs, path = filesystem(url)
    try:
        with reaching(url):
            fs.get_file(path, str(target))
    except FileNotFoundError as error:
        raise Missing(f"no such file: {url}") from error


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(url: str, *, retries: Retries = ONCE) -> str:
    return retries(lambda: _sha256_file(url), f"reading {url}")


def _sha256_file(url: str) -> str:
    fs, path = filesystem(url)
    digest = hashlib.sha256()
    try:
        with reaching(url), fs.open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise Missing(f"no such file: {url}") from error
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
