"""What the builders of a run have reported so far: receipts, and where the time went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from preprocess.build import StageSeconds
from preprocess.shards.receipt import Receipt

Observer = Callable[[dict[str, float]], None]
"""Told of a run: `encode_busy` (0 to 1, over all builders), `samples_per_s`, `rejected_images`, `workers_lost`."""


class Tally:
    """What the builders have reported so far."""

    def __init__(self, receipts: dict[str, Receipt]) -> None:
        self.receipts: dict[str, Receipt] = {}
        self.rejects: dict[str, dict[str, Any]] = {}  # image → reject; an image may lie in two shards
        for receipt in receipts.values():
            self.add(receipt)
        self.by_builder: dict[str, StageSeconds] = {}
        self.workers_lost = 0

    @property
    def seconds(self) -> StageSeconds:
        total = StageSeconds()
        for seconds in self.by_builder.values():
            total = total.plus(seconds)
        return total

    def add(self, receipt: Receipt) -> None:
        self.receipts[receipt["name"]] = receipt
        self.rejects.update({reject["image"]: reject for reject in receipt["rejects"]})

    def encode_busy(self) -> float:
        seconds = self.seconds
        return seconds.encode / seconds.total if seconds.total > 0 else 0.0

    def figures(self, samples_per_s: float) -> dict[str, float]:
        """What an operator watches."""
        return {
            "encode_busy": self.encode_busy(),
            "samples_per_s": samples_per_s,
            "rejected_images": float(len(self.rejects)),
            "workers_lost": float(self.workers_lost),
        }

    def limited_by(self, has_encoder: bool) -> str:
        """The encoder when it was busy nine tenths of the time, else the stage it waited for most."""
        seconds = self.seconds
        if seconds.total == 0:
            return "nothing to do"
        if has_encoder and self.encode_busy() >= 0.9:
            return "encoder"
        waits = {"reading and decoding": seconds.wait_decode, "writing and publishing": seconds.wait_publish}
        return max(waits, key=lambda name: waits[name])
