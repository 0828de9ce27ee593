"""The YAML configuration beside a latent-diffusion checkpoint → our configurations.

Whatever our networks cannot compute the same way is refused by name; nothing is dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

import yaml

from pipeline import storage
from pipeline.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, ScheduleConfig
from pipeline.errors import UserError
from pipeline.importing.content import format_of

T = TypeVar("T")
_REQUIRED: Any = object()


class Section:
    """One mapping of a configuration file; errors name the file and the path of the field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def section(self, name: str) -> Section:
        return Section(self.value(name, dict), f"{self.where}.{name}")

    def value(self, name: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The field `name`, of type `kind` (whole numbers pass as float); a missing one gives the default."""
        value = self.values.get(name, default)
        if value is _REQUIRED:
            raise UserError(f"{self.where}: the field {name} is missing")
        if kind is float and isinstance(value, int):
            value = float(value)
        if name in self.values and not isinstance(value, kind):
            raise UserError(f"{self.where}.{name} must be {kind.__name__}, got {value!r}")
        return cast(T, value)

    def integers(self, name: str) -> tuple[int, ...]:
        values = self.value(name, list)
        if not values and name != "attn_resolutions" and name != "attention_resolutions":
            raise UserError(f"{self.where}.{name} is empty")
        if not all(isinstance(value, int) for value in values):
            raise UserError(f"{self.where}.{name} must be a list of whole numbers, got {values!r}")
        return tuple(values)

    def require(self, name: str, supported: Any) -> None:
        """`UserError` when the field is given and differs from `supported`, the only value our networks know."""
        value = self.values.get(name, supported)
        if value != supported:
            raise UserError(f"{self.where}.{name} = {value!r} is not supported; only {supported!r} is")


def read_yaml(url: str) -> Section:
    """The `model.params` section of a configuration file."""
    format_of(url)  # names what is none
    try:
        data = yaml.safe_load(storage.read_bytes(url))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{url} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UserError(f"{url} is not a configuration: it has no section model")
    return Section(data, url).section("model").section("params")


def first_stage(params: Section) -> Section:
    """The section that describes the first stage, in a whole model's configuration or in its own."""
    return params.section("first_stage_config").section("params") if "first_stage_config" in params.values else params


def autoencoder_config(stage: Section) -> AutoencoderConfig:
    """stage: a first stage's parameters (`ddconfig`, perhaps `embed_dim` and `n_embed`)."""
    dd = stage.section("ddconfig")
    for name, supported in _FIRST_STAGE_ONLY.items():
        dd.require(name, supported)
    channels = dd.value("z_channels", int)
    stage.require("embed_dim", channels)
    width_mult, resolution = dd.integers("ch_mult"), dd.value("resolution", int)
    _require_unit_start(dd, "ch_mult", width_mult)
    attended = dd.integers("attn_resolutions")
    return AutoencoderConfig(
        kind="kl" if dd.value("double_z", bool, True) else "vq",
        latent_channels=channels,
        base_width=dd.value("ch", int),
        width_mult=width_mult,
        num_res_blocks=dd.value("num_res_blocks", int),
        attention_levels=tuple(i for i in range(len(width_mult)) if resolution // 2**i in attended),
        num_embeddings=stage.value("n_embed", int, 8192),
    )


def decoder_config(stage: Section) -> DecoderConfig:
    """The implicit decoder that a released first stage holds: D_phi follows `ddconfig`, the MLP `liifconfig`."""
    dd, liif = stage.section("ddconfig"), stage.section("liifconfig")
    for name in ("cell_decode", "local_ensemble"):
        liif.require(name, True)
    liif.require("feat_unfold", False)
    hidden = liif.integers("hidden_list")
    if len(set(hidden)) != 1:
        raise UserError(f"{liif.where}.hidden_list = {list(hidden)} is not supported; all widths must be equal")
    width_mult = dd.integers("ch_mult")
    # Nothing is up-sampled in D_phi, so all of its levels have the latent's resolution.
    attends = dd.value("resolution", int) // 2 ** (len(width_mult) - 1) in dd.integers("attn_resolutions")
    return DecoderConfig(
        kind="liif",
        base_width=dd.value("ch", int),
        width_mult=width_mult,
        num_res_blocks=dd.value("num_res_blocks", int),
        attention_levels=tuple(range(len(width_mult))) if attends else (),
        mlp_width=hidden[0],
        mlp_depth=len(hidden),
    )


def decoder_like(autoencoder: AutoencoderConfig) -> DecoderConfig:
    """The paper's implicit decoder for an autoencoder that came without one: D_phi follows its decoder."""
    return DecoderConfig(
        base_width=autoencoder.base_width,
        width_mult=autoencoder.width_mult,
        num_res_blocks=autoencoder.num_res_blocks,
        mid_attention=autoencoder.mid_attention,
        norm_groups=autoencoder.norm_groups,
    )


def denoiser_config(params: Section) -> DenoiserConfig:
    """params: a diffusion model's parameters (with `unet_config`)."""
    unet = params.section("unet_config").section("params")
    for name, supported in _UNET_ONLY.items():
        unet.require(name, supported)
    width_mult = unet.integers("channel_mult")
    _require_unit_start(unet, "channel_mult", width_mult)
    return DenoiserConfig(
        base_width=unet.value("model_channels", int),
        width_mult=width_mult,
        num_res_blocks=unet.value("num_res_blocks", int),
        attention_factors=unet.integers("attention_resolutions"),
        dropout=unet.value("dropout", float, 0.0),
        scale_shift=unet.value("use_scale_shift_norm", bool, False),
        resample="resnet" if unet.value("resblock_updown", bool, False) else "conv",
        **_attention_heads(unet),
    )


def schedule_config(params: Section) -> ScheduleConfig:
    """params: a diffusion model's parameters. Defaults are the family's."""
    params.require("beta_schedule", "linear")
    params.require("given_betas", None)
    prediction = params.value("parameterization", str, "eps")
    if prediction not in ("eps", "x0", "v"):
        raise UserError(f"{params.where}.parameterization = {prediction!r} is not one of 'eps', 'x0', 'v'")
    return ScheduleConfig(
        num_steps=params.value("timesteps", int, 1000),
        beta_start=params.value("linear_start", float, 1e-4),
        beta_end=params.value("linear_end", float, 2e-2),
        prediction=cast(Literal["eps", "x0", "v"], prediction),
    )


def base_and_mult(widths: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Widths as base × multipliers: (128, 256) → 128, (1, 2); (96, 144) → 48, (2, 3)."""
    base = math.gcd(*widths)
    return base, tuple(width // base for width in widths)


def _attention_heads(unet: Section) -> dict[str, int]:
    """Either a head's width or the number of heads, as fields of DenoiserConfig."""
    channels, heads = unet.value("num_head_channels", int, -1), unet.value("num_heads", int, -1)
    if channels > 0:
        return {"head_channels": channels}
    if heads < 1:
        raise UserError(f"{unet.where} needs num_head_channels or num_heads")
    return {"num_heads": heads}


def _require_unit_start(section: Section, name: str, width_mult: tuple[int, ...]) -> None:
    if width_mult[0] != 1:
        raise UserError(f"{section.where}.{name} = {list(width_mult)} is not supported; it must start with 1")


_FIRST_STAGE_ONLY: dict[str, Any] = {
    "in_channels": 3,
    "out_ch": 3,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
    "attn_type": "vanilla",
}
_UNET_ONLY: dict[str, Any] = {
    "dims": 2,
    "conv_resample": True,
    "num_classes": None,
    "use_new_attention_order": False,
    "use_spatial_transformer": False,
    "context_dim": None,
    "n_embed": None,
}
