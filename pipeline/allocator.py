"""The C library's memory allocator, set for large tensors that come and go."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep memory that it has freed, for its next tensors; whether that could be set (glibc only).

    By default glibc gives large blocks back to the system at once, and each new one costs a page fault for every 4 kB:
    on a CPU about a tenth of the time of an enlargement. It is for programs whose work this is: what was needed once
    stays with the process. See mallopt(3)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return sum(mallopt(which, value) == 1 for which, value in settings) == len(settings)
