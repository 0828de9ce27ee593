"""Denoiser steps of several requests in one batch.

Each request samples in a thread of its own and asks for one evaluation after the other; what waits while the network is
at work is evaluated together next, whatever step each is at: the denoiser takes a time step for each sample.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
"""z_t (B,C,h,w), t (B,), and what else the denoiser takes for each sample."""


@dataclass(eq=False)
class _Asked:
    inputs: Inputs
    result: Future[Tensor] = field(default_factory=Future)

    def goes_with(self, other: _Asked) -> bool:
        return len(self.inputs) == len(other.inputs) and all(
            a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(self.inputs, other.inputs)
        )


class StepBatches:
    """In place of a denoiser: `run` on the inputs of those who ask at the same time. max_batch: samples at once; larger
    requests are run alone. num_runs, num_samples: for metrics."""

    def __init__(self, run: Callable[..., Tensor], max_batch: int = 16) -> None:
        self._run, self.max_batch = run, max_batch
        self.num_runs = self.num_samples = 0
        self._waiting: collections.deque[_Asked] = collections.deque()
        self._changed, self._is_closed = threading.Condition(), False
        threading.Thread(target=self._work, name="latentzoom-denoise", daemon=True).start()

    def __call__(self, z_t: Tensor, t: Tensor, *others: Tensor | None) -> Tensor:
        asked = _Asked((z_t, t, *(other for other in others if other is not None)))
        with self._changed:
            is_closed = self._is_closed
            if not is_closed:
                self._waiting.append(asked)
                self._changed.notify()
        if is_closed:  # who has the model still
            with torch.no_grad():
                return self._run(*asked.inputs)
        return asked.result.result()

    def close(self) -> None:
        """End the thread, after what waits. Those who ask later are served alone."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _work(self) -> None:
        while together := self._next():
            try:
                with torch.no_grad():
                    made = self._run(*(torch.cat(parts) for parts in zip(*(asked.inputs for asked in together))))
                for asked, part in zip(together, made.split([len(asked.inputs[0]) for asked in together])):
                    asked.result.set_result(part)
            except BaseException as error:  # whoever asked hears of it
                for asked in together:
                    asked.result.set_exception(error)

    def _next(self) -> list[_Asked]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if not self._waiting:
                return []
            together, room = [self._waiting.popleft()], self.max_batch
            room -= len(together[0].inputs[0])
            for asked in list(self._waiting):
                if together[0].goes_with(asked) and len(asked.inputs[0]) <= room:
                    self._waiting.remove(asked)
                    together.append(asked)
                    room -= len(asked.inputs[0])
            self.num_runs += 1
            self.num_samples += self.max_batch - room
            return together
