"""Small reads and writes of the destination, tried again when the store fails for a passing reason."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from preprocess.retry import RetryCounter, with_retries

ATTEMPTS = 6
counter = RetryCounter()


def exists(url: str) -> bool:
    return with_retries(lambda: storage.exists(url), f"looking for {url}", ATTEMPTS, counter)


def read_bytes(url: str) -> bytes:
    return with_retries(lambda: storage.read_bytes(url), f"reading {url}", ATTEMPTS, counter)


def write_bytes(url: str, data: bytes) -> None:
    """Publish `data` atomically."""
    with_retries(lambda: storage.write_bytes(url, data), f"writing {url}", ATTEMPTS, counter)


def sha256_file(url: str) -> str:
    return with_retries(lambda: storage.sha256_file(url), f"reading {url}", ATTEMPTS, counter)


def read_json(url: str) -> Any:
    return with_retries(lambda: storage.read_json(url), f"reading {url}", ATTEMPTS, counter)


def list_files(url: str) -> list[str]:
    return with_retries(lambda: storage.list_files(url), f"listing {url}", ATTEMPTS, counter)
