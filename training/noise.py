"""Random numbers that belong to a place in the run: to a seed, a purpose, a step and a sample, not to a process.

Counter-based (Philox4x32-10; Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): each number is
a function of its place, computed on the device where it is used, for all samples at once. So neither a restart nor
another number of workers or micro-batch changes it, and no generator state needs saving.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


class Draws:
    """Numbers for samples `index` (consecutive, of the global batch) under a key such as (seed, purpose, step). Each
    call draws further numbers, the same ones for the same sequence of calls."""

    def __init__(self, index: range, device: torch.device | str, *key: int | str) -> None:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        self.key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        self.samples = torch.arange(index.start, index.stop, device=device)
        self._calls = 0

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B,*shape) float32 (Box & Muller 1958)."""
        num = math.prod(shape)
        first, second, third, fourth = self._words(-(-num // 4))
        pairs = [_box_muller(first, second), _box_muller(third, fourth)]
        return torch.stack([*pairs[0], *pairs[1]], dim=-1).flatten(1)[:, :num].reshape(-1, *shape)

    def uniform(self) -> Tensor:
        """(B,) float32 in (0, 1)."""
        return _unit(self._words(1)[0][:, 0])

    def integers(self, high: int) -> Tensor:
        """(B,) int64, uniform in 0..high-1 (for high far below 2^32)."""
        return self._words(1)[0][:, 0] * high >> 32

    def _words(self, num_blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        block = torch.arange(num_blocks, device=self.samples.device).expand(len(self.samples), -1)
        sample = self.samples[:, None].expand_as(block)
        call = torch.full_like(block, self._calls)
        self._calls += 1
        return philox(block, call, sample & _MASK, sample >> 32, self.key)


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter (c0, c1, c2, c3): int64 tensors of one shape, values below 2^32."""
    k0, k1 = key
    for _ in range(rounds):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64 bits, whose sign does not matter
        c0, c1, c2, c3 = ((high >> 32) & _MASK) ^ c1 ^ k0, high & _MASK, ((low >> 32) & _MASK) ^ c3 ^ k1, low & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _unit(words: Tensor) -> Tensor:
    """The upper 24 bits as float32 in (0, 1)."""
    return ((words >> 8).float() + 0.5) * 2.0**-24


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = torch.sqrt(-2.0 * torch.log(_unit(first))), 2.0 * math.pi * _unit(second)
    return radius * torch.cos(angle), radius * torch.sin(angle)
