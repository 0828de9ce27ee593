"""A preset and the bundle it is used with must describe one model. What a stage takes over from the bundle keeps the
settings it was trained with; where the preset says something else, that is an error that names the fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from pipeline.autoencoder import Autoencoder
from pipeline.bundle import PARTS, Bundle
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig, ScheduleConfig, to_dict
from pipeline.errors import UserError

Settings = AutoencoderConfig | DecoderConfig | DenoiserConfig | ScheduleConfig

MENDED = "use the preset that the bundle was made with, or set these fields"
_TRUNK = ("base_width", "width_mult", "num_res_blocks", "attention_levels", "mid_attention", "norm_groups")
"""Settings that D_phi and the autoencoder's own decoder share."""


def take_over(stage: str, model: ModelConfig, bundle: Bundle, goes_on: Collection[str] = ()) -> ModelConfig:
    """The preset's model with the settings of the bundle's parts that `stage` does not train anew.

    goes_on: parts that the stage trains from the bundle's weights, which `check_origin` has compared. A denoiser brings
    its scale factor and its schedule: its weights were trained with them. The preset's schedule counts only where the
    denoiser is trained from noise ("denoiser" with new weights). Raises `UserError` where preset and bundle disagree.
    """
    ours, kept = bundle.config, _kept(stage, bundle)
    _refuse([disagreement(name, getattr(ours, name), getattr(model, name)) for name in kept])
    taken: dict[str, Any] = {name: getattr(ours, name) for name in kept}
    if "denoiser" in {*kept, *goes_on}:
        taken |= {"scale_factor": ours.scale_factor, "schedule": ours.schedule}
    return dataclasses.replace(model, **taken)


def check_origin(stage: str, part: str, model: ModelConfig, bundle: Bundle, where: str = "") -> None:
    """The preset's `part` can go on from the weights of the bundle's, which lies at `where` ("": the stage's own): both
    have the same shapes and latents of the same kind; a denoiser also the same task, and the schedule that it was
    trained with. Raises `UserError` where they disagree.

    `decoder`, `denoiser` and `autoencoder` may change what decides no weight's shape: a decoder's inputs, a denoiser's
    dropout, and the noise on its conditions where the preset has some.
    """
    ours, theirs = getattr(bundle.config, part), getattr(model, part)
    if stage not in ("align", "distill"):
        ours = dataclasses.replace(ours, **{name: getattr(theirs, name) for name in _changeable(theirs)})
    names = ["autoencoder.kind", "autoencoder.latent_channels"] if part != "autoencoder" else []
    names += ["task"] if part == "denoiser" else []  # a condition makes its input wider
    pairs = [(name, _at(bundle.config, name), _at(model, name)) for name in names]
    problems = [_sentence(part, pairs, where)]
    problems.append(disagreement(part, ours, theirs, where))
    if part == "denoiser":
        problems.append(disagreement("schedule", bundle.config.schedule, model.schedule, where))
    _refuse(problems)


def _changeable(preset: Settings) -> list[str]:
    if isinstance(preset, DecoderConfig):
        return ["inputs"]
    if isinstance(preset, DenoiserConfig):  # weights for the strength of the noise may be new, but are not left out
        return ["dropout", "condition_noise"] if preset.condition_noise else ["dropout"]
    return []


def trunk_disagreement(autoencoder: Autoencoder, decoder: DecoderConfig, where: str = "") -> str:
    """Why D_phi cannot begin as the autoencoder's own decoder, which must have the same blocks; empty where it can."""
    if not autoencoder.has_decoder or autoencoder.config.kind == "identity":
        return f"the autoencoder of {where or 'the bundle'} has no convolutional decoder"
    left, right = effective(autoencoder.config), effective(decoder)
    pairs = [("norm", "group", right["norm"]), *((name, left[name], right.get(name, left[name])) for name in _TRUNK)]
    return _sentence("convolutional decoder", [(f"decoder.{name}", a, b) for name, a, b in pairs], where)


def check_trunk(autoencoder: Autoencoder, model: ModelConfig, where: str = "") -> None:
    """D_phi can begin as the autoencoder's own decoder, and the model's latents are of that autoencoder's kind. Raises
    `UserError` where they differ."""
    pairs = [
        (f"autoencoder.{name}", getattr(autoencoder.config, name), getattr(model.autoencoder, name))
        for name in ("kind", "latent_channels")
    ]
    problem = _sentence("autoencoder", pairs, where)
    _refuse([problem, trunk_disagreement(autoencoder, model.decoder, where)])


def check_use(stage: str, model: ModelConfig, bundle: Bundle | None) -> None:
    """The model will be used as the bundle's denoiser, where the stage keeps it, was trained to be."""
    if bundle is None or "denoiser" not in _kept(stage, bundle):
        return
    ours = bundle.config
    names = ["task", "image_size", *(["lr_size", "condition_resize"] if ours.task == model.task == "sr" else [])]
    pairs = [(name, getattr(ours, name), getattr(model, name)) for name in names]
    _refuse([_sentence("denoiser", pairs)])


def _kept(stage: str, bundle: Bundle) -> list[str]:
    return [name for name in PARTS if getattr(bundle, name) is not None and name != stage]


def _refuse(problems: list[str]) -> None:
    if found := [problem for problem in problems if problem]:
        raise UserError(f"{'; '.join(found)}; {MENDED}")


def disagreement(part: str, ours: Settings, preset: Settings, where: str = "") -> str:
    """Which settings of a part differ between bundle and preset, in words; empty where both build the same network.
    where: the bundle's address; "" is the stage's own."""
    left, right = effective(ours), effective(preset)
    return _sentence(part, [(f"{part}.{k}", left.get(k), right.get(k)) for k in left | right], where)


def effective(config: Settings) -> dict[str, Any]:
    """The settings that have an effect, as plain JSON types. Attention at levels that do not exist has none, nor has
    the order in which levels are named."""
    values = to_dict(config)
    if isinstance(config, AutoencoderConfig):
        if config.kind == "identity":
            return {"kind": config.kind}
        values["attention_levels"] = _levels(config.attention_levels, range(len(config.width_mult)))
        if config.kind != "vq":
            del values["num_embeddings"]
    elif isinstance(config, DecoderConfig):
        values["attention_levels"] = _levels(config.attention_levels, range(len(config.width_mult)))
        unused = ["light_width", "light_depth"] if config.kind == "liif" else ["mlp_width", "mlp_depth"]
        for name in [*unused, *(["norm_groups"] if config.norm == "none" else [])]:
            del values[name]
    elif isinstance(config, DenoiserConfig):
        factors = [2**level for level in range(len(config.width_mult))]
        values["attention_factors"] = _levels(config.attention_factors, factors)
        if config.num_heads:
            del values["head_channels"]
    return values


def _levels(named: tuple[int, ...], there: Any) -> list[int]:
    return sorted(set(named) & set(there))


def _at(model: ModelConfig, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), model)


def _sentence(part: str, pairs: list[tuple[str, Any, Any]], where: str = "") -> str:
    """pairs: (name, the bundle's value, the preset's). "" where all are equal."""
    differences = [pair for pair in pairs if pair[1] != pair[2]]
    if not differences:
        return ""
    words = ", ".join(
        f"{name} = {ours!r} in the bundle and {preset!r} in the preset" for name, ours, preset in differences
    )
    owner = f"the {part} of {where}" if where else f"the bundle's {part}"
    return f"{owner} has other settings than the preset's: {words}"
