"""What makes two runs the same one. Three questions are asked, and each has its own answer:

    goes on      may a run continue from this checkpoint?        `Identity.fingerprint`, in every checkpoint
    same result  is this finished run what is asked for?         `Identity.digest`, in result.json
    same step    may a pipeline keep what this step once made?   `step_settings`, in the step's key

What belongs to which (yes: with another value it is another one; no: the value may change):

                                                                goes on   same result   same step
    stage, and settings that say what it learns                 yes       yes           yes
    steps, learning rate, its warm-up and schedule; how a step
      is computed, kept and told of (MAY_CHANGE)                no        yes           yes
    how the run goes, not what it makes (HOW_ONLY)              no        no            no
    what is measured and written meanwhile (WATCHING)           no        (1)           (1)
    model: what the stage trains or reads (`model_read`)        yes       yes           yes
    model: other parts, which the bundle names                  no        yes           no
    data: digest of the shards' manifest                        yes       yes           (2)
    weights that the stage begins from or renders with          yes       yes           (2)
    weights of the incoming bundle's other parts                no        yes           (2)
    addresses of bundles that the stage begins from             no        yes           yes

(1) only where the stage may end early by it. (2) by the key of the step before; what lies at an address by its digest.

What is stored outlives this version: fingerprints are compared in today's terms (`Identity.completed`), and neither a
digest nor a key may come out different for what was finished before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline import storage
from pipeline.bundle import PARTS, Bundle
from pipeline.config import ModelConfig, to_dict
from training.config import StageConfig, is_address, is_joint
from training.migrations import in_todays_terms
from training.starts import sources

HOW_ONLY = frozenset({"max_skipped_steps", "loader_threads", "batches_ahead", "shards_ahead"})
"""Settings of every stage that came later and decide how a run goes, not what it makes: they may change when it goes
on, and finished steps of a pipeline stay finished."""
WATCHING = frozenset(
    {
        "validate_every",
        "validate_samples",
        "quality_every",
        "quality_samples",
        "quality_inception",
        "bundle_every",
        "best_by",
        "early_stop_patience",
        "power_ema_every",
    }
)
"""What is measured and written meanwhile: it decides nothing that is trained, but whether a run ends early."""
MAY_CHANGE = frozenset(
    {
        "steps",
        "micro_batch",
        "checkpoint_every",
        "keep",
        "log_every",
        "grid_every",
        "activation_checkpointing",
        "compile",
        "channels_last",
        "lr",
        "warmup_steps",
        "schedule",
    }
)
"""Further settings that may change when a run goes on; every other one decides what is trained."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What one run of one stage is made of. data: digest of the shards' manifest; parts: hash of the weights of each
    part of the incoming bundle."""

    stage: str
    settings: StageConfig
    model: ModelConfig
    data: str
    parts: Mapping[str, str]

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between two parts of one run. Of the model that is what the stage trains: the decoder
        may still be chosen while the autoencoder is being trained."""
        free = MAY_CHANGE | HOW_ONLY | WATCHING
        settings = {name: value for name, value in to_dict(self.settings).items() if name not in free}
        for name in ("start", "decoder_start"):  # the weights themselves count, not where they lie
            settings |= {name: "bundle"} if is_address(settings.get(name, "")) else {}
        model = model_read(self.stage, self.model, joint=is_joint(self.settings))
        fixed = {"stage": self.stage, "model": model, "data": self.data, "settings": settings}
        used = [self.parts[name] for name in self._parts_used() if name in self.parts]
        return {**fixed, "bundle": storage.sha256_bytes(" ".join(used).encode())} if used else fixed

    def _parts_used(self) -> tuple[str, ...]:
        # Alignment stage 2 and distillation render with the decoder; other stages see latents only.
        names: tuple[str, ...] = ("decoder", "denoiser") if self.stage in ("align", "distill") else ()
        names = names or sources(self.stage, self.settings)  # of a stage that goes on from the bundle's weights
        is_drawn = self.model.task == "direct" and getattr(self.settings, "conditions", "") == "drawn"
        if is_drawn and self.model.autoencoder.kind != "identity" and "autoencoder" not in names:
            names += ("autoencoder",)  # it encodes what a step draws
        return names

    def digest(self) -> str:
        """Of all settings, the data and the incoming bundle. It holds the whole model, as the bundle does: a finished
        run whose fingerprint is the same writes its bundle anew, and trains nothing."""
        weights = list(self.parts.values())
        text = repr((self.fingerprint(), deciding(to_dict(self.settings)), to_dict(self.model), weights))
        return storage.sha256_bytes(text.encode())

    def completed(self, stored: dict[str, Any], where: str) -> dict[str, Any]:
        """A fingerprint that a checkpoint under `where` stores, in today's terms, with the settings that did not exist
        when it was written at their defaults: those of the stage and of the model's parts."""
        stored = in_todays_terms(self.stage, self.model, stored, where)
        defaults = to_dict(type(self.settings)())
        settings = {**{k: defaults[k] for k in self.fingerprint()["settings"]}, **stored["settings"]}
        parts = {f.name: to_dict(getattr(self.model, f.name).__class__()) for f in _model_parts(self.model)}
        model = {k: {**parts[k], **v} if k in parts else v for k, v in stored.get("model", {}).items()}
        return {**stored, "settings": settings, "model": model}

    def difference(self, stored: dict[str, Any]) -> str:
        """What a `completed` fingerprint has otherwise, in words; "" where the run may go on."""
        mine = self.fingerprint()
        if mine == stored:
            return ""
        changed = [name for name in mine if mine[name] != stored.get(name)]
        if changed == ["settings"]:
            theirs = stored["settings"]
            fields = [f"{k} was {theirs.get(k)!r}, is {v!r}" for k, v in mine["settings"].items() if theirs.get(k) != v]
            return ", ".join(fields)
        return "different " + " and ".join(changed)


def step_settings(stage: str, settings: StageConfig, model: ModelConfig) -> dict[str, Any]:
    """A stage's part in the key of a pipeline's step: its settings and what it reads of the model, as plain JSON types.
    What came before it is in the keys of the steps before."""
    return {stage: deciding(to_dict(settings)), "model": model_read(stage, model, joint=is_joint(settings))}


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings without those that decide nothing of its outcome."""
    free = HOW_ONLY if settings.get("early_stop_patience") else HOW_ONLY | WATCHING
    return {name: value for name, value in settings.items() if name not in free}


def model_read(stage: str, model: ModelConfig, *, joint: bool = False) -> dict[str, Any]:
    """The part of a model that decides what a stage trains; joint: stage 0 with the implicit decoder. Scale factors
    come from the data, and with them."""
    names = {"autoencoder": ("image_size", "autoencoder"), "decoder": ("image_size", "autoencoder", "decoder")}
    if joint:
        names["autoencoder"] = names["decoder"]
    whole = to_dict(model)
    return {name: whole[name] for name in names.get(stage, whole)}


def part_hashes(bundle: Bundle | None) -> dict[str, str]:
    """Part of a bundle → hash of its weights, for the parts that are there."""
    parts = {} if bundle is None else {name: getattr(bundle, name) for name in PARTS}
    return {name: _hash_of(part) for name, part in parts.items() if part is not None}


def _hash_of(module: nn.Module) -> str:
    data = [tensor.detach().cpu().contiguous().view(-1).numpy().tobytes() for tensor in module.state_dict().values()]
    return storage.sha256_bytes(b"".join(data))


def _model_parts(model: ModelConfig) -> list[dataclasses.Field[Any]]:
    """Fields that are configurations of their own."""
    return [f for f in dataclasses.fields(model) if dataclasses.is_dataclass(getattr(model, f.name))]
