"""What `--from STEP` asks for: that a finished step be done anew, once, however often the job is interrupted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from pipeline import storage


@dataclass(frozen=True)
class Redo:
    """counts: how often each step was asked for anew; part of its key. open: the request that is not finished yet."""

    counts: dict[str, int] = field(default_factory=dict)
    open: str = ""

    @classmethod
    def load(cls, work: str) -> Redo:
        url = _url(work)
        return cls(**storage.read_json(url)) if storage.exists(url) else cls()

    def ask(self, step: str) -> Redo:
        """The state after `--from step`. The same request, typed again before it is finished, is continued."""
        if not step or step == self.open:
            return self
        return Redo({**self.counts, step: self.counts.get(step, 0) + 1}, step)

    def close(self) -> Redo:
        return dataclasses.replace(self, open="")

    def save(self, work: str) -> None:
        if self != Redo.load(work):
            storage.write_json(_url(work), dataclasses.asdict(self))


def _url(work: str) -> str:
    return storage.join(work, "steps", "redo.json")
