"""Typed, frozen model configurations and their JSON form. What a bundle's `config.json` holds.

Sizes are pixels, height before width. `factor` f is pixels per latent cell along one axis.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pipeline.errors import UserError, require

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Pre-trained, frozen autoencoder (the LDM family, Rombach et al. 2022).

    kind: "kl" stores mean and log-variance, "vq" the continuous latent before quantisation. "identity" has no weights:
    the latent is the picture itself (f = 1, 3 channels), for direct super-resolution; the other fields have no effect.
    width_mult: one entry a level; f = 2^(levels - 1). attention_levels: levels whose blocks attend.
    """

    kind: Literal["kl", "vq", "identity"] = "vq"
    latent_channels: int = 3
    base_width: int = 128
    width_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    num_embeddings: int = 8192
    norm_groups: int = 32

    def __post_init__(self) -> None:
        require(self.kind in ("kl", "vq", "identity"), "autoencoder.kind", self.kind, "'kl', 'vq' or 'identity'")
        if self.kind == "identity":
            require(self.latent_channels == 3, "autoencoder.latent_channels", self.latent_channels, "3 for 'identity'")
            require(len(self.width_mult) == 1, "autoencoder.width_mult", self.width_mult, "one level for 'identity'")
        require(self.latent_channels >= 1, "autoencoder.latent_channels", self.latent_channels, "at least 1")
        require(1 <= len(self.width_mult) <= 6, "autoencoder.width_mult", self.width_mult, "1 to 6 levels")
        require(self.num_res_blocks >= 1, "autoencoder.num_res_blocks", self.num_res_blocks, "at least 1")
        require(self.norm_groups >= 1, "autoencoder.norm_groups", self.norm_groups, "at least 1")
        for width in self.widths:
            require(
                width > 0 and width % self.norm_groups == 0,
                "autoencoder.base_width × width_mult",
                width,
                f"a multiple of norm_groups = {self.norm_groups}",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_width * m for m in self.width_mult)

    @property
    def factor(self) -> int:
        return 2 ** (len(self.width_mult) - 1)

    @property
    def stored_channels(self) -> int:
        """Channels of a cached latent: 2C for "kl" (mean, log-variance), C otherwise."""
        return self.latent_channels * (2 if self.kind == "kl" else 1)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Implicit neural decoder ND = f_theta ∘ D_phi, paper eq. (6).

    kind "liif": the paper's MLP over (feature, relative coordinate, cell), 4-corner ensemble; mlp_width × mlp_depth.
    kind "light": a narrow MLP on fields kept at latent resolution (in the spirit of LMF, He & Jin, CVPR 2024);
    light_width × light_depth. The sizes of the kind that is not chosen have no effect.
    D_phi mirrors the autoencoder's decoder; base_width, width_mult, num_res_blocks are its own so that it can be
    narrower than the autoencoder.
    norm: "group", as the autoencoder's decoder has it, or "none". Without normalisation (and without attention,
    whose blocks begin with it) D_phi sees a bounded neighbourhood only, and tiles of a large picture agree exactly with
    the whole; super-resolution networks do better without (Lim et al., "EDSR", CVPRW 2017).
    inputs: what the decoder is trained to render: "latent", a picture's own latent; "condition", the latent of a
    low-resolution picture enlarged and encoded (direct super-resolution); "both".
    """

    kind: Literal["liif", "light"] = "liif"
    norm: Literal["group", "none"] = "group"
    inputs: Literal["latent", "condition", "both"] = "latent"
    base_width: int = 128
    width_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    norm_groups: int = 32
    mlp_width: int = 256
    mlp_depth: int = 4
    light_width: int = 64
    light_depth: int = 3

    def __post_init__(self) -> None:
        require(self.kind in ("liif", "light"), "decoder.kind", self.kind, "'liif' or 'light'")
        require(self.norm in ("group", "none"), "decoder.norm", self.norm, "'group' or 'none'")
        require(
            self.inputs in ("latent", "condition", "both"),
            "decoder.inputs",
            self.inputs,
            "'latent', 'condition' or 'both'",
        )
        require(
            self.norm == "group" or not (self.mid_attention or self.attention_levels),
            "decoder.norm",
            self.norm,
            "'group' where blocks attend (mid_attention, attention_levels)",
        )
        require(1 <= len(self.width_mult) <= 6, "decoder.width_mult", self.width_mult, "1 to 6 levels")
        for name in ("num_res_blocks", "mlp_width", "mlp_depth", "light_width", "light_depth"):
            require(getattr(self, name) >= 1, f"decoder.{name}", getattr(self, name), "at least 1")
        for width in self.widths:
            require(
                width > 0 and (self.norm == "none" or width % self.norm_groups == 0),
                "decoder.base_width × width_mult",
                width,
                f"a multiple of norm_groups = {self.norm_groups}",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_width * m for m in self.width_mult)


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """LDM U-Net eps_theta. attention_factors: down-sampling factors (1, 2, 4, ...) at which blocks attend.

    Attention has heads of head_channels units, or, where num_heads > 0, that many heads at every level. scale_shift:
    the time embedding scales and shifts the norm instead of being added. resample "resnet": levels are joined by
    residual blocks instead of convolutions. The last three exist for checkpoints that were trained so.
    condition_noise: largest strength s of the noise that a super-resolution condition c is trained with (conditioning
    augmentation: Ho et al., "Cascaded Diffusion Models", JMLR 2022; Saharia et al., "Imagen", NeurIPS 2022), as
    sqrt(1 - s²)·c + s·noise, s uniform in [0, condition_noise]. The denoiser is told s; sampling may choose it. 0: no
    noise, and no input for it, as released.
    """

    base_width: int = 224
    width_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    attention_factors: tuple[int, ...] = (2, 4, 8)
    head_channels: int = 32
    norm_groups: int = 32
    dropout: float = 0.0
    num_heads: int = 0
    scale_shift: bool = False
    resample: Literal["conv", "resnet"] = "conv"
    condition_noise: float = 0.0

    def __post_init__(self) -> None:
        noise = self.condition_noise
        require(0.0 <= noise < 1.0, "denoiser.condition_noise", noise, "0 <= condition_noise < 1")
        require(0.0 <= self.dropout < 1.0, "denoiser.dropout", self.dropout, "0 <= dropout < 1")
        require(
            self.num_heads >= 0 and (not self.num_heads or self.base_width % self.num_heads == 0),
            "denoiser.num_heads",
            self.num_heads,
            f"0 or a divisor of base_width = {self.base_width}",
        )
        for width in self.widths:
            require(
                width > 0 and width % self.norm_groups == 0,
                "denoiser.base_width × width_mult",
                width,
                f"a multiple of norm_groups = {self.norm_groups}",
            )
            require(
                self.num_heads > 0 or width % self.head_channels == 0 or not self.attention_factors,
                "denoiser.head_channels",
                self.head_channels,
                f"a divisor of every width {self.widths}",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.base_width * m for m in self.width_mult)

    def heads(self, width: int) -> int:
        """Attention heads of a block of `width` channels."""
        return self.num_heads or width // self.head_channels


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Diffusion schedule: betas = linspace(sqrt(beta_start), sqrt(beta_end), num_steps)^2.

    zero_terminal_snr: sqrt(abar) is shifted and scaled so that the last step is noise alone, abar = 0, and sampling
    begins there (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024, algorithm 1),
    with prediction "v" or "x0": from noise alone, "eps" tells nothing of the picture.
    distilled_steps: 0 for a denoiser that any sampler may drive; 1 for a distilled one, whose single evaluation at the
        noisiest step gives the latent.
    """

    num_steps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    prediction: Literal["eps", "x0", "v"] = "eps"
    zero_terminal_snr: bool = False
    distilled_steps: int = 0

    def __post_init__(self) -> None:
        require(self.distilled_steps in (0, 1), "schedule.distilled_steps", self.distilled_steps, "0 or 1")
        require(self.num_steps >= 1, "schedule.num_steps", self.num_steps, "at least 1")
        require(
            0 < self.beta_start <= self.beta_end < 1,
            "schedule.beta_start, beta_end",
            (self.beta_start, self.beta_end),
            "0 < beta_start <= beta_end < 1",
        )
        require(self.prediction in ("eps", "x0", "v"), "schedule.prediction", self.prediction, "'eps', 'x0' or 'v'")
        if self.zero_terminal_snr:
            allowed = "'v' or 'x0' with schedule.zero_terminal_snr"
            require(self.prediction != "eps", "schedule.prediction", self.prediction, allowed)
            require(self.num_steps >= 2, "schedule.num_steps", self.num_steps, "at least 2 with zero_terminal_snr")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to build the networks of one model.

    task: "generation" (noise → latent), "sr" (the denoiser also sees a condition latent) or "direct": super-resolution
    without a denoiser, whose decoder renders the condition itself, one latent cell for each low-resolution pixel.
    image_size: training image height and width; lr_size: LR height and width for "sr" (0 for the others).
    condition_resize: how the LR image is brought to image size before it is encoded.
    scale_factor: latents are used as z = z_raw × scale_factor; measured by preprocess, 1/std over the data set.
    """

    name: str = "latentzoom"
    task: Literal["generation", "sr", "direct"] = "generation"
    image_size: int = 256
    lr_size: int = 0
    condition_resize: Literal["nearest", "bicubic"] = "bicubic"
    scale_factor: float = 1.0
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        require(self.task in ("generation", "sr", "direct"), "task", self.task, "'generation', 'sr' or 'direct'")
        f = self.autoencoder.factor
        require(self.image_size >= f and self.image_size % f == 0, "image_size", self.image_size, f"a multiple of {f}")
        require(self.scale_factor > 0, "scale_factor", self.scale_factor, "a positive number")
        require(
            (self.task == "sr") == (self.lr_size > 0),
            "lr_size",
            self.lr_size,
            "a positive size for task 'sr' and 0 for the others",
        )
        rendered = {"generation": ("latent",), "sr": ("latent", "both"), "direct": ("condition",)}[self.task]
        require(
            self.decoder.inputs in rendered,
            "decoder.inputs",
            self.decoder.inputs,
            f"{' or '.join(map(repr, rendered))} for task {self.task!r}",
        )
        noise = self.denoiser.condition_noise
        require(not noise or self.task == "sr", "denoiser.condition_noise", noise, "0 for every task but 'sr'")
        require(
            self.autoencoder.kind != "identity" or self.task == "direct",
            "autoencoder.kind",
            self.autoencoder.kind,
            "'kl' or 'vq' for every task but 'direct'",
        )

    @property
    def latent_size(self) -> int:
        return self.image_size // self.autoencoder.factor


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """Build a frozen dataclass from plain JSON types. Unknown or ill-typed fields raise `UserError` naming them."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise UserError(f"{where}: unknown field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    values = {name: _coerce(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, got {value!r}")
        return from_dict(hint, value, where)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{where} = {value!r} is not one of {typing.get_args(hint)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, got {value!r}")
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], v, where) for v in value)
        if len(args) != len(value):
            raise UserError(f"{where} must have {len(args)} entries, got {value!r}")
        return tuple(_coerce(a, v, where) for a, v in zip(args, value))
    if origin in (typing.Union, types.UnionType):
        args = typing.get_args(hint)
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        return _coerce(rest[0], value, where) if len(rest) == 1 else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_plain = isinstance(hint, type) and hint in (int, float, str, bool)
    if is_plain and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise UserError(f"{where} must be {hint.__name__}, got {value!r}")
    return value
