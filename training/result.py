"""What a run of a stage did: handed from its loop to whoever asked, and kept as `result.json` in the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pipeline import storage


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a stage did. `bundle`: URL of the parts so far, with averaged weights; it and `config_digest`
    (`training.identity`) are known when the bundle is written. seconds: of all steps; sample_order: a hash of the ids
    of all samples in order; metrics: the newest figures."""

    stage: str
    bundle: str = ""
    steps: int
    resumed_from: int
    seconds: float
    first_loss: float
    last_loss: float
    sample_order: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    config_digest: str = ""


Trained = tuple[TrainResult, dict[str, Tensor] | None]
"""What a stage's loop hands back: its result without the bundle, and the whole averaged weights by name on the main
worker, None on the others."""


def result_url(run_dir: str) -> str:
    return storage.join(run_dir, "result.json")


def stored_result(run_dir: str, digest: str) -> TrainResult | None:
    """The result of a finished run with exactly these settings."""
    url = result_url(run_dir)
    if not storage.exists(url):
        return None
    raw = storage.read_json(url)
    return TrainResult(**raw) if raw.get("config_digest") == digest else None
