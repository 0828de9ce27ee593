"""Features before tiles: what a tile needs is made by threads that stand aside for those that draw, once for all who
wait for it; and while nobody asks for anything, what lies nearest to what was looked at last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from orchestration.serve.desk import Busy, Desk
from orchestration.serve.scenes import Scene, Scenes
from pipeline.sizes import Window

QUIET = 0.25
"""Seconds without a request after which features are made ahead."""
IsWanted = Callable[[], Awaitable[bool]]


class FeatureWork:
    """desk: of the threads that make features. queue: requests that may wait for some. on_made: called for each."""

    def __init__(self, desk: Desk, scenes: Scenes, queue: int, on_made: Callable[[], object]) -> None:
        self.desk, self.scenes, self.queue, self.on_made = desk, scenes, queue, on_made
        self.num_waiting = 0
        self._under_way: dict[tuple[Any, Window], tuple[asyncio.Task[None], list[IsWanted]]] = {}
        self._last_asked = 0.0

    async def have(self, scene: Scene, tiles: list[Window], is_wanted: IsWanted) -> None:
        """Wait for some of a scene's `missing`. Raises `Busy`, and `Unwanted` when nobody waits any more."""
        if self.num_waiting >= self.queue:
            raise Busy(f"{self.num_waiting} requests are waiting already; try again in a moment")
        self.num_waiting += 1
        try:
            await asyncio.gather(*(asyncio.shield(self._begun(scene, tile, is_wanted)) for tile in tiles))
        finally:
            self.num_waiting -= 1

    def asked(self) -> None:
        """Somebody looks at something."""
        self._last_asked = time.monotonic()

    async def work_ahead(self, is_idle: Callable[[], bool]) -> None:
        """Never ends."""

        async def yes() -> bool:
            return True

        while True:
            await asyncio.sleep(QUIET)
            while is_idle() and not self.num_waiting and time.monotonic() - self._last_asked > QUIET:
                ahead = await asyncio.to_thread(self.scenes.ahead, self.desk.num_threads)
                if not ahead:
                    break
                tasks = [self._begun(scene, tile, yes) for scene, tile in ahead]
                if any(isinstance(made, Exception) for made in await asyncio.gather(*tasks, return_exceptions=True)):
                    break  # whoever asks for it hears why

    def _begun(self, scene: Scene, tile: Window, is_wanted: IsWanted) -> asyncio.Task[None]:
        key = scene.key, tile
        if key in self._under_way:
            task, wanted_by = self._under_way[key]
            wanted_by.append(is_wanted)
            return task
        wanted_by = [is_wanted]

        async def is_wanted_still() -> bool:
            for one in wanted_by:
                if await one():
                    return True
            del self._under_way[key]  # who asks from now on has it begun anew
            return False

        task = asyncio.create_task(self.desk.do(partial(scene.make, tile), is_wanted_still, whose=scene.key))
        self._under_way[key] = task, wanted_by
        task.add_done_callback(partial(self._ended, key))
        return task

    def _ended(self, key: tuple[Any, Window], task: asyncio.Task[None]) -> None:
        if key in self._under_way and self._under_way[key][0] is task:
            del self._under_way[key]
        if not task.cancelled() and task.exception() is None:  # perhaps nobody waits for it any more
            self.on_made()
        self.scenes.tidy()
