"""Where the weights of a trained part begin when they are not new: another bundle's part, or the autoencoder's decoder.

The incoming bundle is what `--bundle` gave, with the parts to go on from in the place of its own: every stage then
finds its beginning there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline import storage
from pipeline.autoencoder import Autoencoder
from pipeline.bundle import Bundle, load_bundle, load_strict
from pipeline.config import ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.denoiser import Denoiser
from pipeline.errors import UserError, without_secrets
from pipeline.initialise import initialise_autoencoder, initialise_decoder
from pipeline.starter import starter_or
from training.agreement import check_origin, check_trunk, trunk_disagreement
from training.config import Preset, StageConfig, is_address, is_joint

_OF_DENOISER = ("schedule", "scale_factor", "task", "image_size", "lr_size", "condition_resize")
"""Settings of a model that belong to its denoiser's weights."""
_STAGES_OF_DENOISER = ("denoiser", "align", "distill")
"""Stages that train them."""

Origin = dict[str, str]
"""part: whose weights were taken; of: the bundle's address, "bundle" for --bundle; model: its name."""


def starts(stage: str, config: StageConfig) -> dict[str, str]:
    """Part that the stage trains → how its weights begin: "random", "linear", "bundle", "autoencoder" or an address."""
    start: str = vars(config)["start"]
    if not is_joint(config):
        return {stage if stage in ("autoencoder", "decoder") else "denoiser": start}
    return {"autoencoder": start, "decoder": vars(config)["decoder_start"] or start}


def given_starts(stage: str, config: StageConfig) -> dict[str, str]:
    """Those of `starts` that take weights from somewhere."""
    return {part: start for part, start in starts(stage, config).items() if start not in ("random", "linear")}


def sources(stage: str, config: StageConfig) -> tuple[str, ...]:
    """Parts of the incoming bundle whose weights the stage begins from."""
    given = given_starts(stage, config)
    return tuple(dict.fromkeys("autoencoder" if start == "autoencoder" else part for part, start in given.items()))


def ignored(
    stage: str, config: StageConfig, asked: ModelConfig, model: ModelConfig, *, is_bundle_given: bool
) -> list[str]:
    """A line on each thing that was asked for and that the stage has no use for. asked: the model that the command
    says; model: the one that is trained."""
    lines = []
    if stage == "autoencoder" and is_bundle_given and not {"bundle", "autoencoder"} & {*starts(stage, config).values()}:
        lines.append("autoencoder: nothing of --bundle is used; its autoencoder goes on with --init bundle")
    is_used = stage != "autoencoder" and asked.task != "direct" and asked.scale_factor == model.scale_factor
    if asked.scale_factor != ModelConfig.scale_factor and not is_used:
        has_none = stage == "autoencoder" or asked.task == "direct"
        told = "the data decides it" if has_none else f"data and bundle have {model.scale_factor:g}"
        lines.append(f"{stage}: model.scale_factor = {asked.scale_factor:g} is not used; {told}")
    return lines


def with_init(preset: Preset, stage: str, inits: Sequence[str] = ()) -> Preset:
    """The preset with `--init START` or `--init PART=START` as settings of the stage, addresses made absolute.
    `UserError` for a part that the stage does not train, and for what is no start."""
    for init in inits:
        part, sign, start = init.partition("=")
        trained = list(starts(stage, preset.stage(stage)))
        if not sign or not part.isalpha():
            part, start = trained[0], init
        if part not in trained:
            raise UserError(f"--init {init}: stage {stage} does not train the {part}; it trains {', '.join(trained)}")
        start = address(start) if start not in ("random", "linear", "bundle", "autoencoder") else start
        name = "decoder_start" if (stage, part) == ("autoencoder", "decoder") else "start"
        preset = with_start(preset, stage, name, start)
    for name in ("start", "decoder_start"):
        if set_to := vars(preset.stage(stage)).get(name):
            preset = with_start(preset, stage, name, str(set_to))
    return preset


def address(bundle: str) -> str:
    """A bundle's address as every worker understands it: local paths made absolute, "starter" with its look."""
    if bundle == "starter":
        return "starter:faithful"
    return bundle if bundle.startswith(("starter:", "models:/")) else storage.absolute(bundle)


def with_whole(preset: Preset, start: str, place: str) -> Preset:
    """The preset whose stages after the autoencoder go on from the parts of the bundle `start`, which lies at `place`:
    decoder and denoiser where it has them, D_phi from its autoencoder where it has no implicit decoder and the shapes
    agree."""
    bundle = load_bundle(starter_or(place))
    if bundle.decoder is not None:
        preset = with_start(preset, "decoder", "start", start)
    elif not trunk_disagreement(bundle.autoencoder, preset.model.decoder):
        preset = with_start(preset, "decoder", "start", "autoencoder")
    return preset if bundle.denoiser is None else with_start(preset, "denoiser", "start", start)


def with_start(preset: Preset, stage: str, name: str, start: str) -> Preset:
    """The preset with the field `name` ("start" or "decoder_start") of a stage set."""
    start = address(start) if is_address(start) else start
    field: dict[str, Any] = {name: start}
    changed: dict[str, Any] = {stage: dataclasses.replace(preset.stage(stage), **field)}
    return dataclasses.replace(preset, **changed)


def with_starts(
    stage: str,
    config: StageConfig,
    model: ModelConfig,
    bundle: Bundle | None,
    places: Mapping[str, str],
    load: Callable[[str], Bundle] = load_bundle,
) -> tuple[Bundle | None, dict[str, Origin]]:
    """The bundle that a stage works on, which is `bundle` with the parts that it starts from, and for each part that
    the stage trains so where its weights come from.

    places: address → where its bundle really lies (registered models). load: `pipeline.bundle.outline` does where only
    the settings count. Raises `UserError` in one line where a part is
    missing, or was made for another kind of model or with other shapes.
    """
    origins: dict[str, Origin] = {}
    others: dict[str, Bundle] = {}
    for part, start in given_starts(stage, config).items():
        other = load(places.get(start, starter_or(start))) if is_address(start) else bundle
        where = without_secrets(start) if is_address(start) else "the bundle"
        source = "autoencoder" if start == "autoencoder" else part
        if other is None or getattr(other, source) is None:
            raise UserError(
                f"stage {stage} needs a bundle with the {source}, and {where} has none; train stage {source} first "
                "(--bundle), or start from something else (--init)"
            )
        if part == "denoiser" and other.config.schedule.distilled_steps:
            raise UserError(
                f"stage {stage}: the denoiser of {where} is a one-step student already; give its teacher's bundle, "
                "that of the stage before"
            )
        elsewhere = where if is_address(start) else ""
        if start == "autoencoder":
            check_trunk(other.autoencoder, model, elsewhere)
        else:
            check_origin(stage, part, model, other, elsewhere)
        if part == "autoencoder" and not is_joint(config) and not other.autoencoder.has_decoder:
            raise UserError(f"the autoencoder of {where} has no convolutional decoder to go on from")
        origins[part] = {"part": source, "of": where.removeprefix("the "), "model": other.config.name}
        others[part] = other
        if other is not bundle:
            bundle = _with_part(part, other, bundle, stage)
    if bundle is not None:
        bundle = dataclasses.replace(bundle, meta=_meta(stage, bundle, others))
    return bundle, origins


def _with_part(part: str, other: Bundle, bundle: Bundle | None, stage: str) -> Bundle:
    """`bundle` with one part of `other` and what belongs to it: of a denoiser, what it was trained for and with. Where
    nothing else was given, all of `other`."""
    if bundle is None:
        return other if stage != "autoencoder" else Bundle(other.config, other.autoencoder, other.decoder)
    names = (part, *_OF_DENOISER) if part == "denoiser" else (part,)
    config = dataclasses.replace(bundle.config, **{name: getattr(other.config, name) for name in names})
    return dataclasses.replace(bundle, config=config, **{part: getattr(other, part)})


def _meta(stage: str, bundle: Bundle, others: Mapping[str, Bundle]) -> dict[str, Any]:
    """What is told of the bundle that a stage works on, where parts begin as those of `others`: nothing of weights that
    are not at work in it, and what became of those that are."""
    used = [*([] if stage == "autoencoder" else [bundle]), *others.values()]
    imported = [one.meta["imported_from"] for one in used if "imported_from" in one.meta]
    stages = {**bundle.meta.get("stages", {})}
    if stage in _STAGES_OF_DENOISER:
        before = others["denoiser"].meta.get("stages", {}) if "denoiser" in others else {}
        stages = {name: facts for name, facts in stages.items() if name not in _STAGES_OF_DENOISER}
        stages |= {name: facts for name, facts in before.items() if name in _STAGES_OF_DENOISER}
    rest = {name: value for name, value in bundle.meta.items() if name != "imported_from"}
    return {**rest, "stages": stages, **({"imported_from": imported[0]} if imported else {})}


def start_autoencoder(autoencoder: Autoencoder, start: str, bundle: Bundle | None) -> None:
    """In place: what an autoencoder begins with. One without a convolutional decoder takes the encoder alone."""
    if start == "linear":
        initialise_autoencoder(autoencoder)
    elif start != "random":
        assert bundle is not None
        _take(autoencoder, bundle.autoencoder.state_dict())


def start_decoder(decoder: ImplicitDecoder, start: str, bundle: Bundle | None) -> None:
    """In place: what an implicit decoder begins with."""
    if start == "linear":
        initialise_decoder(decoder)
    elif start == "autoencoder":
        assert bundle is not None
        trunk_from(decoder, bundle.autoencoder)
    elif start != "random":
        assert bundle is not None and bundle.decoder is not None
        load_strict(decoder, bundle.decoder.state_dict(), "the decoder to start from")


def start_denoiser(denoiser: Denoiser, start: str, bundle: Bundle | None) -> None:
    """In place: what a denoiser begins with. Weights that tell it how noisy its condition is, where only the new one
    has some, stay as they are: without effect at first."""
    if start == "random":
        return
    assert bundle is not None and bundle.denoiser is not None
    tensors = bundle.denoiser.state_dict()
    if not bundle.denoiser.config.condition_noise:
        tensors |= {n: t for n, t in denoiser.state_dict().items() if n.startswith("strength_embedding.")}
    load_strict(denoiser, tensors, "the denoiser to start from")


def trunk_from(decoder: ImplicitDecoder, autoencoder: Autoencoder) -> None:
    """In place: D_phi becomes the autoencoder's own decoder without up-sampling layers, output norm and convolution."""
    own = {name.removeprefix("decoder."): tensor for name, tensor in autoencoder.state_dict().items()}
    _take(decoder.trunk, own)


def _take(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what `module` has of `tensors`, all of it; what is left over has no place there."""
    wanted = module.state_dict().keys()
    load_strict(module, {name: tensor for name, tensor in tensors.items() if name in wanted}, "the part to start from")
