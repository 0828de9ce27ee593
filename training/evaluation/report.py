"""What an evaluation says: figures with intervals, each naming its protocol, hung on one bundle and one data set."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.errors import UserError, first_line
from pipeline.metrics.bootstrap import percentile_interval

PROTOCOL_VERSION = 2
"""Raised when a change of code changes figures: reports of different versions are not comparable. 2: every picture is
resized from its own pixels; resamples that pair."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number. method: "ours" or a baseline ("nearest", "bicubic"). setting: an output size ("128x128"), a scale
    ("x5.3") or a pair of sizes ("128x128-160x160"). low, high: 95 % bootstrap interval, None where there is none.
    resamples: of ours, the figure in every bootstrap resample; those of two reports on the same samples pair."""

    name: str
    method: str
    setting: str
    value: float
    low: float | None
    high: float | None
    protocol: str
    num: int
    resamples: tuple[float, ...] = ()

    @classmethod
    def of_mean(
        cls, name: str, method: str, setting: str, values: np.ndarray, resamples: np.ndarray, protocol: str
    ) -> Figure:
        """The mean of per-picture values (N,), with its resamples (R,). Baselines keep none: they decide nothing."""
        low, high = percentile_interval(resamples)
        return cls(
            name=name,
            method=method,
            setting=setting,
            value=float(values.astype(np.float64).mean()),
            low=low,
            high=high,
            protocol=protocol,
            num=len(values),
            resamples=rounded(resamples) if method == "ours" else (),
        )


def rounded(resamples: np.ndarray) -> tuple[float, ...]:
    """Eight digits of each: enough for differences, and half as long in a report."""
    return tuple(float(f"{value:.8g}") for value in resamples)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole evaluation. notes say what is missing and why. spec: the options. split: "" where the data has none.
    sr_mode: how pairs were made, "" unless the task is sr. lr_size: height and width of the model's SR inputs or 0.
    dataset: which of the data sets with published figures it is (`published.DATASETS`), "" where none is known."""

    task: str
    model: str
    model_name: str
    bundle_digest: str
    encoder_identity: str
    data: str
    data_digest: str
    split: str
    num: int
    seed: int
    sampler: str
    sr_mode: str = ""
    lr_size: int = 0
    dataset: str = ""
    figures: tuple[Figure, ...] = ()
    protocol_version: int = PROTOCOL_VERSION
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    spec: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, setting: str, method: str = "ours") -> Figure | None:
        """The figure with this name, setting and method, or None."""
        wanted = (name, setting, method)
        return next((f for f in self.figures if (f.name, f.setting, f.method) == wanted), None)

    def metrics(self) -> dict[str, float]:
        """{"psnr_rgb/x5.3": 24.1, "psnr_rgb/x5.3/bicubic": 23.0, ...}: names for MLflow."""
        return {f"{f.name}/{f.setting}" + ("" if f.method == "ours" else f"/{f.method}"): f.value for f in self.figures}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> dict[str, Any]:
        """As `to_dict`, with values that JSON lacks (infinite PSNR of equal pictures) as text."""
        result: dict[str, Any] = _json_safe(self.to_dict())
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Raises `UserError` when `data` is no report."""
        try:
            figures = tuple(_figure(dict(f)) for f in data["figures"])
            return cls(**{**data, "figures": figures, "notes": tuple(data.get("notes", ()))})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is not a report of latentzoom evaluate: {first_line(error)}") from error


_NUMBERS = ("value", "low", "high")


def load_report(url: str) -> Report:
    """Read a `report.json`. Raises `UserError` when it is something else."""
    try:
        return Report.from_dict(storage.read_json(url))
    except UserError as error:
        raise UserError(f"{url}: {error}") from error


def _json_safe(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return value


def _figure(fields: dict[str, Any]) -> Figure:
    for key in _NUMBERS:
        fields[key] = _number(fields[key])
    fields["resamples"] = tuple(float(value) for value in fields.get("resamples", ()))
    return Figure(**fields)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
