"""Training figures as Ray metrics: Ray exports them to Prometheus beside its own, as `ray_latentzoom_...`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PREFIX = "latentzoom_"
_NOT_ALLOWED = re.compile(r"[^a-zA-Z0-9_]")


class RayMetricsReporter:
    """A `training.reporter.Reporter` that sets one gauge for each figure, labelled with the stage."""

    def __init__(self, stage: str) -> None:
        self._tags = {"stage": stage}
        self._gauges: dict[str, Any] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        set_gauges(self._gauges, {**values, "step": float(step)}, self._tags)

    def images(self, step: int, name: str, image: np.ndarray) -> None: ...

    def params(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def set_gauges(gauges: dict[str, Any], values: dict[str, float], tags: dict[str, str]) -> None:
    """Set (and make, where new) a gauge for each value."""
    from ray.util.metrics import Gauge

    for name, value in values.items():
        if name not in gauges:
            words = name.replace("_", " ")
            gauges[name] = Gauge(PREFIX + _NOT_ALLOWED.sub("_", name), description=words, tag_keys=tuple(tags))
        gauges[name].set(float(value), tags=tags)


class PreprocessingMetrics:
    """How a preprocessing run goes, as gauges. Nothing is exported outside of Ray."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def __call__(self, figures: dict[str, float]) -> None:
        ray = sys.modules.get("ray")  # who is in Ray has loaded it; who has not does not need it
        if ray is not None and ray.is_initialized():
            set_gauges(self._gauges, figures, {"stage": "preprocess"})
