"""The file system behind a URL, and what goes wrong on the way to it in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import Unreachable, UserError, is_network_error, unreachable, without_secrets
from pipeline.extras import install

_WAIT_S = 20.0


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path in it. Unknown schemes raise `UserError`."""
    try:
        fs, path = fsspec.core.url_to_fs(str(url), **_options(str(url)))
    except ImportError as error:  # fsspec's own words for a client that is not there name neither it nor its module
        is_ours = str(url).startswith(("http://", "https://", "s3://", "s3a://"))
        todo = f"install the extra remote: {install('remote')}" if is_ours else str(error)
        raise UserError(f"cannot use {without_secrets(str(url))}: {todo}") from error
    except ValueError as error:
        raise UserError(f"cannot use {url}: {error}") from error
    except Exception as error:  # some connect here already
        if not is_network_error(error):
            raise
        raise unreachable(str(url), error) from error
    return fs, path


def _options(url: str) -> dict[str, Any]:
    """A web server that does not answer is given up after seconds; a large file may take its time."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {
        "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=_WAIT_S, sock_read=2 * _WAIT_S)}
    }


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Around anything that talks to the store of `url`: what its client raises becomes one line, `Unreachable`. Errors
    of a local disk, and what is simply not there, stay as they are."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(f"nothing can be written to {url}; use a folder or an object store") from error
    except Exception as error:
        if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            error = (
                error.__cause__ if isinstance(error.__cause__, Exception) else error
            )  # fsspec's word for all of HTTP
        if isinstance(error, Unreachable) or not is_network_error(error) or is_local(url) or is_absent(error):
            raise
        raise unreachable(str(url), error) from error


def is_absent(error: BaseException) -> bool:
    """Whether a web server, or S3, answered that there is no such thing."""
    response = getattr(error, "response", None)  # botocore's is a dict
    if isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchKey":
        return True
    return getattr(error, "status", None) in (404, 405, 410, 416)


def is_local(url: str) -> bool:
    return isinstance(filesystem(url)[0], LocalFileSystem)


def local_path(url: str) -> Path | None:
    """The path of what lies on this machine, /path or file:///path; None for another address, whose client need not be
    installed."""
    if "://" not in url:
        return Path(url)
    return Path(filesystem(url)[1]) if url.startswith("file://") else None


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended. Parts may not leave the folder."""
    for part in parts:
        if part.startswith("/") or ".." in part.split("/"):
            raise UserError(f"{part!r} would leave the folder {url}")
    return "/".join([str(url).rstrip("/") or "/", *parts])


def absolute(url: str) -> str:
    """Local paths made absolute; other URLs unchanged. Workers of a cluster have another working folder."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        return str(url)
    try:
        return str(Path(path).resolve())
    except (OSError, RuntimeError):  # a link that leads to itself: whoever uses it says so
        return str(Path(path).absolute())
