"""A preset and the bundle it is used with must describe one model. What a stage takes over from the bundle keeps the
settings it was trained with; where the preset says something else, that is an error that names the fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.bundle import PARTS, Bundle
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ModelConfig, ScheduleConfig, to_dict
from pipeline.errors import UserError

Settings = AutoencoderConfig | DecoderConfig | DenoiserConfig | ScheduleConfig

MENDED = "use the preset that the bundle was made with, or set these fields"


def take_over(stage: str, model: ModelConfig, bundle: Bundle) -> ModelConfig:
    """The preset's model with the settings of the bundle's parts that `stage` does not train anew.

    A denoiser brings its scale factor and its schedule: its weights were trained with them. The preset's schedule
    counts only where the denoiser is trained from noise ("denoiser"); "align", which trains with the schedule, refuses
    another one. Raises `UserError` where preset and bundle disagree.
    """
    ours, kept = bundle.config, _kept(stage, bundle)
    problems = [disagreement(name, getattr(ours, name), getattr(model, name)) for name in kept]
    taken: dict[str, Any] = {name: getattr(ours, name) for name in kept}
    if "denoiser" in kept:
        if stage == "align":
            problems.append(disagreement("schedule", ours.schedule, model.schedule))
        taken |= {"scale_factor": ours.scale_factor, "schedule": ours.schedule}
    _refuse(problems)
    return dataclasses.replace(model, **taken)


def check_use(stage: str, model: ModelConfig, bundle: Bundle | None) -> None:
    """The model will be used as the bundle's denoiser, where the stage keeps it, was trained to be."""
    if bundle is None or "denoiser" not in _kept(stage, bundle):
        return
    ours = bundle.config
    names = ["task", "image_size", *(["lr_size", "condition_resize"] if ours.task == model.task == "sr" else [])]
    pairs = [(name, getattr(ours, name), getattr(model, name)) for name in names]
    _refuse([_sentence("denoiser", [pair for pair in pairs if pair[1] != pair[2]])])


def _kept(stage: str, bundle: Bundle) -> list[str]:
    return [name for name in PARTS if getattr(bundle, name) is not None and name != stage]


def _refuse(problems: list[str]) -> None:
    if found := [problem for problem in problems if problem]:
        raise UserError(f"{'; '.join(found)}; {MENDED}")


def disagreement(part: str, ours: Settings, preset: Settings) -> str:
    """Which settings of a part differ between bundle and preset, in words; empty where both build the same network."""
    left, right = effective(ours), effective(preset)
    return _sentence(
        part, [(f"{part}.{k}", left.get(k), right.get(k)) for k in left | right if left.get(k) != right.get(k)]
    )


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


def _sentence(part: str, differences: list[tuple[str, Any, Any]]) -> str:
    if not differences:
        return ""
    words = ", ".join(
        f"{name} = {ours!r} in the bundle and {preset!r} in the preset" for name, ours, preset in differences
    )
    return f"the bundle's {part} has other settings than the preset's: {words}"
