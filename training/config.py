"""A model and how its stages are trained: presets, and their settings changed by name. What a stage can be told is in
`training.stage_config`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pipeline.common_options import did_you_mean
from pipeline.config import ModelConfig, from_dict, to_dict
from pipeline.errors import UserError, require
from training.stage_config import AlignStage as AlignStage
from training.stage_config import AutoencoderStage as AutoencoderStage
from training.stage_config import DecoderStage as DecoderStage
from training.stage_config import DenoiserStage as DenoiserStage
from training.stage_config import DistillStage as DistillStage
from training.stage_config import Precision as Precision
from training.stage_config import StageConfig as StageConfig
from training.stage_config import check_start as check_start
from training.stage_config import is_address as is_address
from training.stage_config import is_joint as is_joint

STAGES = ("autoencoder", "decoder", "denoiser", "align", "distill")
StageName = Literal["autoencoder", "decoder", "denoiser", "align", "distill"]
D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and how its stages are trained. one_step: whether a super-resolution model is distilled in the end."""

    name: str
    model: ModelConfig
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    decoder: DecoderStage = field(default_factory=DecoderStage)
    denoiser: DenoiserStage = field(default_factory=DenoiserStage)
    align: AlignStage = field(default_factory=AlignStage)
    distill: DistillStage = field(default_factory=DistillStage)
    one_step: bool = False

    def __post_init__(self) -> None:
        allowed = "false for every task but 'sr': what is distilled is super-resolution by diffusion"
        require(not self.one_step or self.model.task == "sr", "one_step", self.one_step, allowed)
        if is_joint(self.autoencoder) and self.model.decoder.inputs != "latent":
            raise UserError(
                "autoencoder.decoder = 'implicit' trains the decoder on latents of the pictures themselves, and "
                f"model.decoder.inputs = {self.model.decoder.inputs!r} is of one that renders conditions; use "
                "autoencoder.decoder=convolutional, whose decoder has a stage of its own"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that lead to the whole model, in order. A first stage trained with the implicit decoder needs no
        `decoder` stage, direct super-resolution no denoiser, and the autoencoder "identity" no training."""
        names = STAGES[1:] if self.model.autoencoder.kind == "identity" else STAGES
        left_out: tuple[str, ...] = ("denoiser", "align") if self.model.task == "direct" else ()
        left_out += () if self.one_step else ("distill",)
        return tuple(n for n in names if n not in left_out and not (n == "decoder" and is_joint(self.autoencoder)))

    @property
    def uses_latents(self) -> bool:
        """Whether the stages after the autoencoder read cached latents; else they read pixels and encode themselves."""
        return self.model.task != "direct" or self.decoder.conditions == "cached"

    def stage(self, name: str) -> StageConfig:
        """The settings of one stage; `UserError` for an unknown name."""
        require(name in STAGES, "stage", name, f"one of {', '.join(STAGES)}")
        return getattr(self, name)


def preset_to_dict(preset: Preset) -> dict[str, Any]:
    """A preset as plain JSON types."""
    return to_dict(preset)


def preset_from_dict(data: dict[str, Any]) -> Preset:
    """The inverse of `preset_to_dict`, strict about names and types."""
    return from_dict(Preset, data, "preset")


def override(config: D, assignments: Sequence[str]) -> D:
    """`config` with dotted fields replaced: ["align.lr=1e-6", "model.decoder.mlp_width=64"].

    Values are JSON, or plain text where JSON does not parse. Unknown names are a `UserError`.
    """
    data = to_dict(config)
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        if not sign or not path:
            raise UserError(f"{assignment!r} is not of the form name.field=value")
        target, names = data, path.strip().split(".")
        for depth, name in enumerate(names):
            if not isinstance(target, dict) or name not in target:
                known = ", ".join(sorted(target)) if isinstance(target, dict) else "nothing below it"
                near = did_you_mean(name, target) if isinstance(target, dict) else ""
                raise UserError(f"no setting {'.'.join(names[: depth + 1])!r}{near}; known there: {known}")
            if depth < len(names) - 1:
                target = target[name]
        target[names[-1]] = _parse(text.strip())
    return from_dict(type(config), data, "preset")


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _whole(text: str) -> int:
    if len(text) > 19 or not -(1 << 63) <= int(text) < 1 << 63:
        raise UserError(f"{text[:40]} is too large a number for a setting")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise UserError(f"{text} is no number that a setting can be")
    return float(text)


def first_stage_unit(kind: str, side: int) -> float:
    """What the sums of LDM's autoencoder loss are divided by here, where errors are means. Its "kl" loss sums over the
    3·side² values of an image and adds kl_weight × the KL sum; its "vq" loss is a mean already."""
    return 3.0 * side * side if kind == "kl" else 1.0


def older_first_stage(settings: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Stage 0's settings as they were written before `adversarial_balance` was one, in today's terms: kl_weight stood
    beside errors that are means, and the discriminator's weight was what it says."""
    if "adversarial_balance" in settings:
        return settings
    side = model.image_size if settings.get("decoder") == "implicit" else settings.get("crop") or model.image_size
    unit = first_stage_unit(model.autoencoder.kind, side)
    balance = "fixed" if settings.get("adversarial_weight") else "adaptive"
    weight = settings.get("kl_weight", AutoencoderStage().kl_weight) * unit
    return {**settings, "adversarial_balance": balance, "kl_weight": weight}


def with_scale_factor(model: ModelConfig, scale_factor: float) -> ModelConfig:
    """The model with the latents' measured scale factor."""
    return dataclasses.replace(model, scale_factor=scale_factor)
