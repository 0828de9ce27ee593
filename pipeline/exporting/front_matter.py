"""The head of a model card (YAML between two lines of dashes) as the Hugging Face hub reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCardData

from pipeline.config import ModelConfig

LIBRARY = "latentzoom"
UNKNOWN = "unknown"
"""The hub's word for a licence that is not stated."""
_HEAD = re.compile(r"\A---\n(.*?)\n---\n\n?", re.DOTALL)
_USE = re.compile(r"\n## Use (?:in diffusers|with onnxruntime)\n.*?(?=\n## |\Z)", re.DOTALL)
"""What `diffusers_folder` and `onnx_files` append."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One figure of an evaluation. metric: its identifier, such as "psnr_y"; setting: a size or a scale, "x4"."""

    metric: str
    setting: str
    value: float
    protocol: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the hub is told beside the model's own configuration. licence: an SPDX name; "" where none is stated.
    data: what was measured on, "" where nothing was."""

    licence: str = ""
    data: str = ""
    measured: Sequence[Measured] = field(default_factory=tuple)


def with_front_matter(card: str, config: ModelConfig, facts: Facts, library: str = LIBRARY) -> str:
    """The card with a head for the hub in place of any that it has. library: what loads the folder."""
    task = "unconditional-image-generation" if config.task == "generation" else "image-to-image"
    tags = [LIBRARY, "implicit-neural-representation", "arbitrary-scale"]
    tags += ["image-generation"] if config.task == "generation" else ["super-resolution"]
    tags += [] if config.task == "direct" else ["latent-diffusion"]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^a-z0-9._-]+", "-", facts.data.lower()).strip("-") or "private",
            dataset_name=facts.data or "not named",
            dataset_config=one.setting,
            metric_type=one.metric,
            metric_name=f"{one.metric} {one.setting}",
            metric_value=one.value,
            metric_config=one.protocol or None,
        )
        for one in facts.measured
    ]
    data = ModelCardData(
        license=facts.licence.lower() or UNKNOWN,
        library_name=library,
        pipeline_tag=task,
        tags=tags,
        model_name=config.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{card_of_bundle(card)}"


def is_exported(card: str) -> bool:
    """Whether a card has a head that was written here."""
    head = _HEAD.match(card)
    return head is not None and f"- {LIBRARY}\n" in f"{head[1]}\n"


def card_of_bundle(card: str) -> str:
    """The card of what was exported: without the head for the hub, and without what only the exported files are used
    by."""
    return _USE.sub("", _HEAD.sub("", card, count=1))
