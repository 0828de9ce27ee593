"""The threads that draw, and the queue before them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from pipeline.errors import UserError

T = TypeVar("T")


class Busy(UserError):
    """The queue is full, or the work took longer than a request may wait."""


class Unwanted(UserError):
    """The one who asked has gone."""


class Desk:
    """Runs work on `num_threads` threads, each of one torch thread on a CPU. queue: requests that may wait; seconds:
    how long one may wait and be worked on. A thread whose request gave up waiting is taken until its work has ended:
    long work looks itself whether it is still wanted."""

    def __init__(self, num_threads: int, *, queue: int, seconds: float) -> None:
        self.num_threads, self.queue, self.seconds = num_threads, queue, seconds
        self._pool = ThreadPoolExecutor(num_threads, "latentzoom-draw", initializer=_one_thread)
        self._free = asyncio.Semaphore(num_threads)
        self.waiting = 0
        self.busy = 0

    def check(self) -> None:
        """Raises `Busy` where the queue is full."""
        if self.waiting >= self.queue:
            raise Busy(f"{self.waiting} requests are waiting already; try again in a moment")

    async def do(self, work: Callable[[], T], is_wanted: Callable[[], Awaitable[bool]] | None = None) -> T:
        """The result of `work`. Work whose turn comes when nobody wants it any more is not begun: `Unwanted`. Raises
        `Busy`, and what the work raises."""
        self.check()
        try:
            async with asyncio.timeout(self.seconds):
                with self._counted():
                    await self._free.acquire()
                try:
                    if is_wanted is not None and not await is_wanted():
                        raise Unwanted("nobody waits for it any more")
                    future = asyncio.get_running_loop().run_in_executor(self._pool, work)
                except BaseException:
                    self._free.release()
                    raise
                self.busy += 1
                future.add_done_callback(self._ended)
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise Busy(f"it took more than {self.seconds:g} s; try again, or ask for less") from error

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self.busy -= 1
        self._free.release()
        if not future.cancelled():
            future.exception()  # perhaps nobody waits for it any more

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1


_once = threading.Lock()


def _one_thread() -> None:
    with _once:
        torch.set_num_threads(1)
