"""The threads that draw, and the queue before them."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from pipeline.errors import UserError

T = TypeVar("T")
NICE = 5
"""Of threads whose work takes long: others go first, by about three to one. With more, other programs of the machine
would leave them nothing."""


class Busy(UserError):
    """The queue is full, or the work took longer than a request may wait."""


class Unwanted(UserError):
    """The one who asked has gone."""


class Desk:
    """Runs work on `num_threads` threads, each of one torch thread on a CPU. queue: requests that may wait; seconds:
    how long one may wait and be worked on. is_aside: the threads take what others leave of the processor (a nice value
    of 5, on Linux), so that short work need not wait for theirs. A thread whose request gave up waiting is taken until
    its work has ended: long work looks itself whether it is still wanted."""

    def __init__(self, num_threads: int, *, queue: int, seconds: float, is_aside: bool = False) -> None:
        self.num_threads, self.queue, self.seconds = num_threads, queue, seconds
        begin = _begin_aside if is_aside else _one_thread
        self._pool = ThreadPoolExecutor(num_threads, "latentzoom-draw", initializer=begin)
        self._turns = _Turns(num_threads)
        self.busy = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._turns.num_waiting

    @property
    def is_idle(self) -> bool:
        return not self.busy and not self.waiting

    def check(self) -> None:
        """Raises `Busy` where the queue is full."""
        if self.waiting >= self.queue:
            raise Busy(f"{self.waiting} requests are waiting already; try again in a moment")

    async def do(
        self, work: Callable[[], T], is_wanted: Callable[[], Awaitable[bool]] | None = None, *, whose: Hashable = None
    ) -> T:
        """The result of `work`. whose: among those who wait, each is served in turn, however much one asks for. Work
        whose turn comes when nobody wants it any more is not begun: `Unwanted`. Raises `Busy`, and what the work
        raises."""
        self.check()
        try:
            async with asyncio.timeout(self.seconds):
                await self._turns.take(whose)
                try:
                    if is_wanted is not None and not await is_wanted():
                        raise Unwanted("nobody waits for it any more")
                    future = asyncio.get_running_loop().run_in_executor(self._pool, work)
                except BaseException:
                    self._turns.give()
                    raise
                self.busy += 1
                future.add_done_callback(self._ended)
                return await asyncio.shield(future)
        except TimeoutError as error:
            raise Busy(f"it took more than {self.seconds:g} s; try again, or ask for less") from error

    def stop(self) -> None:
        """Let go of all who wait, now and later: `Unwanted`."""
        self._turns.stop()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self.busy -= 1
        self._turns.give()
        if not future.cancelled():
            future.exception()  # perhaps nobody waits for it any more


class _Turns:
    """`num` may be taken at a time. Those who wait are served in the order of start-time fair queueing with equal
    shares (Goyal, Vin & Cheng, SIGCOMM 1996): the n-th that one asks for comes after everybody's (n-1)-th."""

    def __init__(self, num: int) -> None:
        self._num_free = num
        self._line: list[tuple[int, int, asyncio.Future[None]]] = []
        self._round, self._rounds, self._count = 0, dict[Hashable, int](), itertools.count()
        self.num_waiting = 0
        self._is_stopped = False

    def stop(self) -> None:
        self._is_stopped = True
        for _, _, waiting in self._line:
            if not waiting.done():
                waiting.set_exception(Unwanted("the server ends"))

    async def take(self, whose: Hashable) -> None:
        if self._is_stopped:
            raise Unwanted("the server ends")
        if self._num_free:
            self._num_free -= 1
            return
        turn = self._rounds[whose] = max(self._round, self._rounds.get(whose, 0)) + 1
        mine = asyncio.get_running_loop().create_future()
        heapq.heappush(self._line, (turn, next(self._count), mine))
        self.num_waiting += 1
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # its turn came meanwhile
                self.give()
            raise
        finally:
            self.num_waiting -= 1

    def give(self) -> None:
        while self._line:
            self._round, _, first = heapq.heappop(self._line)
            if not first.done():
                first.set_result(None)
                return
        self._round = 0
        self._rounds.clear()
        self._num_free += 1


_once = threading.Lock()


def _one_thread() -> None:
    with _once:
        torch.set_num_threads(1)


def _begin_aside() -> None:
    _one_thread()
    if sys.platform == "linux":  # where a thread has a nice value of its own, see setpriority(2)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
