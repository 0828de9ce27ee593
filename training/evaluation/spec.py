"""What an evaluation measures, as a frozen config. Its fingerprint names the folder of its finished chunks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.common_options import did_you_mean
from pipeline.config import to_dict
from pipeline.errors import MANY, SEEDS, UserError, require_range
from pipeline.metrics.protocols import PROTOCOLS, Protocol
from pipeline.sizes import MAX_SIDE
from training.evaluation.published import DATASETS
from training.evaluation.report import PROTOCOL_VERSION

Task = Literal["reconstruction", "generation", "sr"]
BASELINES = ("nearest", "bicubic", "lanczos")
"""Enlargements that ours are measured beside."""
SrMode = Literal["auto", "fixed-input", "fixed-truth"]
ONE_STEP = "one step, as it was distilled"
"""What reports call the sampling of a distilled model."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """sizes: output heights = widths ("reconstruction", "generation"). scales: SR factors. num: samples (fewer when the
    data has fewer). seed: sample i uses seed + i. num_steps, eta: of the sampler; None: the model's own, 20 or, of a
    distilled one, 1. condition_noise: strength of the noise on SR conditions. teacher: bundle that is measured beside
    the model on the same inputs and noise, in teacher_steps. protocols: PSNR protocols.
    sr_mode: "fixed-input" resizes each picture to the model's lr_size and the truth to lr_size × scale (faces);
    "fixed-truth" crops the picture and shrinks it by the scale (DIV2K); "auto" takes the first for shard sets,
    but not for direct super-resolution.
    inception, vgg16, lpips, lpips_heads: weight files (path or URL); without them stand-ins with their own names.
    chunk_size: samples computed together, the unit of work and of resumption. batch_size: samples in memory at once.
    dataset: which of `published.DATASETS` the data is; "": what a shard set says of itself."""

    task: Task
    sizes: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    num: int = 50_000
    seed: int = 0
    sampler: Literal["ddim", "dpm++"] = "dpm++"
    num_steps: int | None = None
    eta: float = 0.0
    condition_noise: float = 0.0
    teacher: str = ""
    teacher_steps: int = 20
    protocols: tuple[Protocol, ...] = ("rgb",)
    sr_mode: SrMode = "auto"
    split: str = "val"
    inception: str = ""
    vgg16: str = ""
    lpips: str = ""
    lpips_heads: str = ""
    num_pictures: int = 4
    chunk_size: int = 16
    batch_size: int = 16
    dataset: str = ""

    def __post_init__(self) -> None:
        if self.task not in ("reconstruction", "generation", "sr"):
            raise UserError(f"task = {self.task!r} is not allowed; use reconstruction, generation or sr")
        for name in ("num", "num_steps", "teacher_steps", "chunk_size", "batch_size"):
            lowest = 0 if name == "num_steps" and self.task == "sr" else 1  # 0: the condition itself is rendered
            if getattr(self, name) is not None and not lowest <= getattr(self, name) <= MANY:
                raise UserError(f"{name} = {getattr(self, name)} is not allowed; use at least {lowest}, at most {MANY}")
        require_range(self, *SEEDS, "seed")
        require_range(self, 0, 1, "eta")
        if self.condition_noise and (self.task != "sr" or not 0 < self.condition_noise < 1):
            raise UserError(f"condition_noise = {self.condition_noise:g} is not allowed; use 0, or with sr less than 1")
        if self.teacher and self.task != "sr":
            raise UserError(f"a teacher is measured beside a model for task sr only, not {self.task}")
        if self.task == "sr" and not self.scales:
            raise UserError("task sr needs --scales, for example --scales 5.3,7,10,10.7,12")
        if any(not 0 < s <= MAX_SIDE for s in self.scales):
            raise UserError(f"scales = {self.scales} is not allowed; use positive numbers, at most {MAX_SIDE}")
        if any(not 1 <= s <= MAX_SIDE for s in self.sizes):
            raise UserError(f"sizes = {self.sizes} is not allowed; use positive numbers, at most {MAX_SIDE}")
        if self.dataset and self.dataset not in DATASETS:
            near = did_you_mean(self.dataset, DATASETS)
            raise UserError(
                f"dataset = {self.dataset!r} has no published figures{near}; use one of {', '.join(DATASETS)}"
            )
        for protocol in self.protocols:
            if protocol not in PROTOCOLS:
                near = did_you_mean(protocol, PROTOCOLS)
                raise UserError(f"protocol {protocol!r} is not known{near}; use one of {', '.join(PROTOCOLS)}")

    def fingerprint(self, bundle_digest: str, data_digest: str, teacher_digest: str = "") -> str:
        """Hash of all that decides a chunk's numbers, except how many chunks there are and how they are batched."""
        values = dataclasses.asdict(self)
        for name in ("num", "batch_size", "dataset", "teacher", *(() if teacher_digest else ("teacher_steps",))):
            del values[name]
        if not self.condition_noise:  # as before there was such a setting: what is half done goes on
            del values["condition_noise"]
        values |= {"teacher": teacher_digest} if teacher_digest else {}
        values["baselines"] = BASELINES
        values |= {"bundle": bundle_digest, "data": data_digest, "protocol_version": PROTOCOL_VERSION}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def sampler_text(self, *, is_distilled: bool = False) -> str:
        if self.num_steps == 0:
            return "rendered directly, without diffusion"
        noise = f", condition noise {self.condition_noise:g}" if self.condition_noise else ""
        steps = 20 if self.num_steps is None else self.num_steps
        return f"{ONE_STEP if is_distilled else f'{self.sampler}, {steps} steps, eta {self.eta:g}'}{noise}"


def distilled_steps(config: Mapping[str, Any]) -> int:
    """Evaluations that the model of a bundle's config.json was distilled to; 0 where it was not."""
    return int(config["model"].get("schedule", {}).get("distilled_steps", 0))


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A bundle that each worker finds by itself, since machines share no cache. uri: path, URL or models:/ URI; a path
    must be on storage that every machine sees. digest: what all of them must find there."""

    uri: str
    tracking_uri: str
    digest: str


def spec_to_dict(spec: EvaluationSpec) -> dict[str, Any]:
    """Plain JSON types; `from_dict(EvaluationSpec, ...)` reads it back."""
    return to_dict(spec)


def size_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def scale_name(scale: float) -> str:
    return f"x{scale:g}"
