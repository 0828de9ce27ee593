"""Independent pieces of work on all the threads that PyTorch may use, without a barrier after every operation.

PyTorch splits each operation over its threads and joins them before the next one. For many small operations that is
slow, and slower still beside other programs. Here each thread runs whole pieces with single-threaded operations.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def for_each(action: Callable[[T], None], pieces: Sequence[T]) -> None:
    """`action` on every piece, in any order, on up to torch.get_num_threads() threads, without gradient. The first
    exception is raised here, after the pieces under way; pieces not yet begun are dropped."""
    num_threads = min(torch.get_num_threads(), len(pieces))
    if num_threads <= 1:
        for piece in pieces:
            action(piece)
        return
    queue = iter(pieces)  # next() on a list's iterator is atomic
    is_inference, is_stopped = torch.is_inference_mode_enabled(), threading.Event()

    def work() -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            for piece in queue:
                if is_stopped.is_set():
                    return
                try:
                    action(piece)
                except BaseException:
                    is_stopped.set()
                    raise

    pool = _pool(torch.get_num_threads())
    workers = [pool.submit(work) for _ in range(num_threads)]
    try:
        for worker in workers:
            worker.result()
    finally:
        is_stopped.set()  # Ctrl-C: end after the pieces under way
        for worker in workers:
            worker.exception()


def _pool(num_threads: int) -> ThreadPoolExecutor:
    """One pool a size and process (threads do not survive a fork)."""
    key = os.getpid(), num_threads
    with _lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(num_threads, thread_name_prefix="latentzoom-render")
            ready = threading.Barrier(num_threads + 1)

            def begin() -> None:
                torch.set_num_threads(1)  # of this thread; but it also changes what new threads start with, hence:
                ready.wait()

            for _ in range(num_threads):
                _pools[key].submit(begin)
            ready.wait()
            torch.set_num_threads(num_threads)
        return _pools[key]
