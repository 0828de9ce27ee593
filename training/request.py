"""What whoever starts a run asks for, as one value on its way from `train` to the stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from training.config import Preset
from training.quality import MakeQuality
from training.reporter import Reporter
from training.stopping import Stop


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """One stage to train, the same on every worker of a world.

    data: URL of the shards. bundle: URL of what earlier stages made.
    reporters: makers of sinks for figures besides the run folder; they are called on the main worker only, when
        training starts.
    use_deepspeed: else distributed data parallel, or one process.
    stop_requested: asked every few seconds, by all workers at the same step; the firmest answer counts.
    progress_stream: where the progress line goes; None is standard error.
    places: address of a bundle to start from → where it lies, for addresses that are no paths or URLs (a registry's).
    profile: optimizer steps whose time is looked at, into `profile/` of the run folder (`training.profiling`).
    make_quality: the evaluation behind early figures of quality (`training.quality`); None: there are none.
    """

    stage: str
    preset: Preset
    data: str
    run_dir: str
    bundle: str | None = None
    reporters: Sequence[Callable[[], Reporter]] = ()
    use_deepspeed: bool = False
    stop_requested: Callable[[], Stop] = lambda: Stop.NO
    progress_stream: TextIO | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    profile: int = 0
    make_quality: MakeQuality | None = None
