"""The fixed held-out samples that a run is validated on, and what a stage says of them.

They are the first samples of the shards' split `val`, never mirrored, in chunks that are dealt to the workers. What is
computed together is the same for any number of workers, and noise belongs to the sample (`training.noise`, under step
0, which training does not have): so figures repeat to the bit, after a restart too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.bundle import Bundle
from preprocess.shards.sample import Batch
from training.context import Context
from training.micro_batch import MicroBatch, placed

SPLIT = "val"
CHUNK = 8
"""Samples that are computed together."""


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    """What a stage measures on held-out samples.

    build: a network with the parameters, by name, that the engine trains. measure: (network, samples) → values (B,) of
    each of `names`. best_by: the figure that the best bundle is chosen by, where the settings name none. pixels,
    latents: what is read of the samples. whole: the model with this network, as it would be used."""

    build: Callable[[], nn.Module]
    names: tuple[str, ...]
    measure: Callable[[nn.Module, MicroBatch], dict[str, Tensor]]
    best_by: str
    whole: Callable[[nn.Module], Bundle]
    pixels: bool = True
    latents: bool = True


def num_held_out(context: Context) -> int:
    """Samples that the run is validated on: 0 where it is not, or where nothing is held out."""
    config = context.config
    there = context.manifest.splits.get(SPLIT, 0)
    return min(config.validate_samples, there) if config.validate_every else 0


class HeldOut:
    """This worker's share of the held-out samples, read once and kept in memory."""

    def __init__(self, context: Context, figures: StageFigures) -> None:
        self.context, self.figures = context, figures
        self.num = num_held_out(context)
        chunks = range(-(-self.num // CHUNK))
        world = context.world
        first, last = (len(chunks) * rank // world.size for rank in (world.rank, world.rank + 1))
        self._chunks = chunks[first:last]
        self._kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[MicroBatch]:
        """The samples chunk by chunk, on the device; `index` counts from the first held-out sample on."""
        self._kept = self._read() if self._kept is None else self._kept
        for chunk, batch in zip(self._chunks, self._kept):
            start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, self.num)
            yield placed(batch, slice(0, stop - start), start, self.context.world.device)

    def _read(self) -> list[Batch]:
        if not self._chunks:
            return []
        loader = self.context.loader(
            pixels=self.figures.pixels,
            latents=self.figures.latents,
            batch_size=CHUNK,
            split=SPLIT,
            main_only=True,
            shuffle=False,
        )
        try:
            loader.load_state_dict({**loader.state_dict(), "position": self._chunks[0] * CHUNK})
            return [batch for _, batch in zip(self._chunks, iter(loader))]
        finally:
            loader.close()
