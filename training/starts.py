"""Where the weights of a trained part begin when they are not new: another bundle's part, or the autoencoder's decoder.

The incoming bundle is what `--bundle` gave, with the parts to go on from in the place of its own: every stage then
finds its beginning there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline import storage
from pipeline.autoencoder import Autoencoder
from pipeline.bundle import Bundle, load_bundle, load_strict
from pipeline.config import ModelConfig, to_dict
from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError, without_secrets
from pipeline.initialise import initialise_autoencoder, initialise_decoder
from pipeline.starter import starter_or
from training.config import Preset, StageConfig, is_address, is_joint

_TRUNK = ("base_width", "width_mult", "num_res_blocks", "attention_levels", "mid_attention", "norm_groups")
"""Settings that D_phi and the autoencoder's own decoder share."""
_SHAPELESS = ("dropout", "inputs")
"""Settings of a part that decide no weight's shape."""

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
    elif not _differing_trunk(preset.model, bundle.autoencoder):
        preset = with_start(preset, "decoder", "start", "autoencoder")
    return preset if bundle.denoiser is None else with_start(preset, "denoiser", "start", start)


def with_start(preset: Preset, stage: str, name: str, start: str) -> Preset:
    """The preset with the field `name` ("start" or "decoder_start") of a stage set."""
    start = address(start) if is_address(start) else start
    field: dict[str, Any] = {name: start}
    changed: dict[str, Any] = {stage: dataclasses.replace(preset.stage(stage), **field)}
    return dataclasses.replace(preset, **changed)


def with_starts(
    stage: str, config: StageConfig, model: ModelConfig, bundle: Bundle | None, places: Mapping[str, str]
) -> tuple[Bundle | None, dict[str, Origin]]:
    """The bundle that a stage works on, which is `bundle` with the parts that it starts from, and for each part that
    the stage trains so where its weights come from.

    places: address → where its bundle really lies (registered models). Raises `UserError` in one line where a part is
    missing, or was made for another kind of model or with other shapes.
    """
    origins: dict[str, Origin] = {}
    for part, start in given_starts(stage, config).items():
        other = load_bundle(places.get(start, starter_or(start))) if is_address(start) else bundle
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
        _check_fits(stage, part, start, where, model, other)
        if part == "autoencoder" and not is_joint(config) and not other.autoencoder.has_decoder:
            raise UserError(f"the autoencoder of {where} has no convolutional decoder to go on from")
        origins[part] = {"part": source, "of": where.removeprefix("the "), "model": other.config.name}
        if other is not bundle:
            bundle = _with_part(part, other, bundle, stage)
    return bundle, origins


def _with_part(part: str, other: Bundle, bundle: Bundle | None, stage: str) -> Bundle:
    """`bundle` with one part of `other` and what belongs to it; where nothing else was given, all of `other`."""
    if bundle is None:
        imported = {name: other.meta[name] for name in ("imported_from",) if name in other.meta}
        return other if stage != "autoencoder" else Bundle(other.config, other.autoencoder, meta=imported)
    names = (part, "schedule", "scale_factor") if part == "denoiser" else (part,)
    config = dataclasses.replace(bundle.config, **{name: getattr(other.config, name) for name in names})
    return dataclasses.replace(bundle, config=config, **{part: getattr(other, part)})


def _check_fits(stage: str, part: str, start: str, where: str, model: ModelConfig, other: Bundle) -> None:
    theirs, mine = to_dict(other.config), to_dict(model)
    names = ["autoencoder.kind", "autoencoder.latent_channels"]
    if part == "denoiser":  # a condition makes its input wider
        names += ["task", *(f"schedule.{name}" for name in theirs["schedule"])]
    if start != "autoencoder":
        names += [f"{part}.{name}" for name in theirs[part] if name not in _SHAPELESS]
    differing = _differing(theirs, mine, names)
    if not differing and start == "autoencoder":
        differing = _differing_trunk(model, other.autoencoder)
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise UserError(
            f"stage {stage} cannot start from the {'autoencoder' if start == 'autoencoder' else part} of {where}: "
            f"{'; '.join(differing[:4])}{more}; use the settings that it was made with, or start otherwise"
        )


def _differing(theirs: dict[str, Any], mine: dict[str, Any], names: Sequence[str]) -> list[str]:
    pairs = {f"model.{name}": (_at(theirs, name), _at(mine, name)) for name in names}
    return [f"{name} is {a!r} there and {b!r} here" for name, (a, b) in pairs.items() if a != b]


def _differing_trunk(model: ModelConfig, autoencoder: Autoencoder) -> list[str]:
    """Why D_phi cannot begin as the autoencoder's own decoder: it must have the same blocks."""
    if not autoencoder.has_decoder or autoencoder.config.kind == "identity":
        return ["it has no convolutional decoder"]
    theirs, mine = to_dict(autoencoder.config), to_dict(model.decoder)
    if mine["norm"] != "group":
        return [f"model.decoder.norm is {mine['norm']!r}, and its decoder has group norm"]
    return [
        f"{n} of its decoder is {theirs[n]!r} and model.decoder.{n} {mine[n]!r}" for n in _TRUNK if theirs[n] != mine[n]
    ]


def _at(tree: dict[str, Any], name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree


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


def trunk_from(decoder: ImplicitDecoder, autoencoder: Autoencoder) -> None:
    """In place: D_phi becomes the autoencoder's own decoder without up-sampling layers, output norm and convolution."""
    own = {name.removeprefix("decoder."): tensor for name, tensor in autoencoder.state_dict().items()}
    _take(decoder.trunk, own)


def _take(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load what `module` has of `tensors`, all of it; what is left over has no place there."""
    wanted = module.state_dict().keys()
    load_strict(module, {name: tensor for name, tensor in tensors.items() if name in wanted}, "the part to start from")
