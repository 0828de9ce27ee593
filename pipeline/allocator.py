"""The C library's memory allocator, set for large tensors that come and go."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h
_DEFAULTS = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 << 10, _TOP_PAD: 128 << 10}
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[bool]:
    """Within, this process keeps memory that it has freed, for its next tensors → whether that could be set (glibc).

    By default glibc gives large blocks back to the system at once, and each new one costs a page fault for every 4 kB:
    on a CPU about a tenth of the time of an enlargement. See mallopt(3)."""
    try:
        library = ctypes.CDLL(None)
        is_set = sum(library.mallopt(which, value) == 1 for which, value in _KEEPING.items()) == len(_KEEPING)
    except (OSError, AttributeError):
        yield False
        return
    try:
        yield is_set
    finally:
        for which, value in _DEFAULTS.items():
            library.mallopt(which, value)
        library.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Return to the system what was freed and lies between what is in use (glibc), in every arena: threads that make
    and drop large tensors for hours would else hold their largest moment, each in an arena of its own. See
    malloc_trim(3)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
