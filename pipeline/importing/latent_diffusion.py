"""Checkpoints of the latent-diffusion family → bundles: the authors' released ones and CompVis'.

released   [first_stage_model.]encoder.0 (encoder), encoder.1 (1×1), decoder.decoder.0 (1×1), decoder.decoder.1 (D_phi),
           decoder.inr.imnet (MLP); no convolutional decoder
ldm        [first_stage_model.]encoder, quant_conv, post_quant_conv, decoder, quantize; no implicit decoder
both       model.diffusion_model (U-Net), model_ema (its moving average), scale_factor, buffers of the schedule
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser
from pipeline.config import ModelConfig
from pipeline.denoiser import Denoiser
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from pipeline.importing import settings
from pipeline.importing.checkpoint import read_checkpoint
from pipeline.importing.names import Source, ema_name, first_stage_name, head_name, unet_source
from pipeline.importing.transfer import check_left_over, transfer

Family = Literal["released", "ldm"]
Weights = Literal["ema", "raw"]

_PARTS: dict[Family, dict[str, str]] = {
    "released": {
        "encoder.": "encoder.0.",
        "quant_conv.": "encoder.1.",
        "trunk.post_quant_conv.": "decoder.decoder.0.",
        "trunk.": "decoder.decoder.1.",
        "head.": "decoder.inr.imnet.",
    },
    "ldm": {
        "encoder.": "encoder.",
        "quant_conv.": "quant_conv.",
        "post_quant_conv.": "post_quant_conv.",
        "decoder.": "decoder.",
        "quantizer.": "quantize.",
    },
}
_BUFFERS = {
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar", "scale_factor", "model_ema.decay", "model_ema.num_updates"),
}
"""Tensors outside the networks: the schedule (recomputed), the training objective's state, and the scale."""


def import_checkpoint(
    checkpoint: str,
    config: str,
    family: Family,
    *,
    weights: Weights = "ema",
    lr_size: int | None = None,
    name: str | None = None,
) -> Bundle:
    """Read a checkpoint and its YAML configuration (paths or URLs) into a bundle of what it holds.

    A first stage alone gives a bundle without a denoiser; "ldm" never has an implicit decoder. weights: the denoiser's
    moving average or its raw weights. The first stage inside a whole model always has its raw weights, on which the
    denoiser was trained; one that stands alone gives its moving average if it has one. lr_size: the LR size that an SR
    model was trained on; the configuration does not tell, so the latent's size is taken when it is None.
    Raises `UserError` naming what is missing, left over, ill-shaped or not supported.
    """
    params = settings.read_yaml(config)
    tensors = read_checkpoint(checkpoint)
    is_whole = any(key.startswith(("model.diffusion_model.", "first_stage_model.")) for key in tensors)
    prefix = "first_stage_model." if is_whole else ""
    model = _model_config(params, tensors, family, is_whole, lr_size, name or storage_stem(checkpoint))
    bundle = Bundle(model, build_autoencoder(model, has_decoder=family == "ldm"))
    bundle.decoder = build_decoder(model) if family == "released" else None
    bundle.denoiser = build_denoiser(model) if is_whole else None
    if not is_whole:
        weights = "ema" if weights == "ema" and any(key.startswith("model_ema.") for key in tensors) else "raw"

    used: set[str] = set()
    for part in (bundle.autoencoder, bundle.decoder):
        if part is not None:
            used |= _fill(part, _first_stage_sources(part, family, prefix, model), tensors, weights, prefix, checkpoint)
    if bundle.denoiser is not None:
        _check_schedule(tensors, model, checkpoint)
        used |= _fill_denoiser(bundle.denoiser, tensors, weights, checkpoint)
    losses = (prefix + "loss.", prefix + "model_ema.") if is_whole else ("loss.",)
    check_left_over({k for k in set(tensors) - used - _BUFFERS if not k.startswith(losses)}, checkpoint)
    bundle.meta = {
        "weights": weights,
        "imported_from": {
            "format": family,
            "file": checkpoint.rstrip("/").rsplit("/", 1)[-1],
            "sha256": storage.sha256_file(checkpoint),
        },
    }
    bundle.card = _card(bundle, family)
    return bundle


def storage_stem(url: str) -> str:
    """The last part of a path or URL without its suffix: a name for a model."""
    return url.rstrip("/").rsplit("/", 1)[-1].rsplit(".", 1)[0] or "imported"


def _model_config(
    params: settings.Section,
    tensors: Mapping[str, Tensor],
    family: Family,
    is_whole: bool,
    lr_size: int | None,
    name: str,
) -> ModelConfig:
    stage = settings.first_stage(params)
    autoencoder = settings.autoencoder_config(stage)
    image_size = stage.section("ddconfig").value("resolution", int)
    decoder = settings.decoder_config(stage) if family == "released" else settings.decoder_like(autoencoder)
    if "unet_config" not in params.values:
        if is_whole:
            raise UserError(f"{params.where} has no unet_config, but the checkpoint holds a denoiser")
        return ModelConfig(name=name, image_size=image_size, autoencoder=autoencoder, decoder=decoder)
    image_size = params.value("image_size", int) * autoencoder.factor
    is_sr = _is_super_resolution(params, autoencoder.latent_channels, family)
    if lr_size is not None and not is_sr:
        raise UserError(f"--lr-size {lr_size} does not apply: {params.where} describes a generation model")
    scale = tensors.get("scale_factor")
    return ModelConfig(
        name=name,
        task="sr" if is_sr else "generation",
        image_size=image_size,
        lr_size=(lr_size or image_size // autoencoder.factor) if is_sr else 0,
        condition_resize="nearest",
        scale_factor=float(scale) if scale is not None else params.value("scale_factor", float, 1.0),
        autoencoder=autoencoder,
        decoder=decoder,
        denoiser=settings.denoiser_config(params),
        schedule=settings.schedule_config(params),
    )


def _is_super_resolution(params: settings.Section, channels: int, family: Family) -> bool:
    """Whether the U-Net sees a condition latent beside its input; other conditions are refused."""
    unet = params.section("unet_config").section("params")
    unet.require("out_channels", channels)
    key = params.value("conditioning_key", str, None) if params.values.get("conditioning_key") else None
    if key is None:
        unet.require("in_channels", channels)
        return False
    if family == "ldm":
        raise UserError(f"{params.where}.conditioning_key = {key!r}: only unconditional models can be imported")
    params.require("conditioning_key", "concat")
    params.require("c_encode", True)
    unet.require("in_channels", 2 * channels)
    return True


def _first_stage_sources(part: nn.Module, family: Family, prefix: str, model: ModelConfig) -> dict[str, Source]:
    levels = len(model.autoencoder.width_mult)
    return {name: Source(prefix + _first_stage_key(name, _PARTS[family], levels, model)) for name in part.state_dict()}


def _first_stage_key(name: str, parts: Mapping[str, str], levels: int, model: ModelConfig) -> str:
    ours = next(p for p in sorted(parts, key=len, reverse=True) if name.startswith(p))
    rest = name.removeprefix(ours)
    if ours == "head.":
        return parts[ours] + head_name(rest, model.decoder.mlp_depth)
    is_network = ours in ("encoder.", "decoder.", "trunk.")
    return parts[ours] + (first_stage_name(rest, levels) if is_network else rest)


def _fill(
    part: nn.Module,
    sources: dict[str, Source],
    tensors: Mapping[str, Tensor],
    weights: Weights,
    prefix: str,
    where: str,
) -> set[str]:
    """Copy one part of the first stage. Returns the checkpoint's names for it, moving averages included."""
    raw = {source.key for source in sources.values()}
    is_alone = not prefix
    if is_alone and weights == "ema":
        sources = {name: Source(ema_name(source.key)) for name, source in sources.items()}
    transfer(part, sources, tensors, where)
    return raw | ({ema_name(key) for key in raw} if is_alone else set())


def _fill_denoiser(denoiser: Denoiser, tensors: Mapping[str, Tensor], weights: Weights, where: str) -> set[str]:
    """Copy the U-Net. Returns the checkpoint's names for it, raw and moving average."""
    config = denoiser.config
    attends = tuple(2**level in config.attention_factors for level in reversed(range(len(config.width_mult))))
    raw, ema = {}, {}
    for name in denoiser.state_dict():
        source = unet_source(name.removeprefix("unet."), config.num_res_blocks, attends)
        key = "diffusion_model." + source.key
        raw[name] = Source("model." + key, source.part)
        ema[name] = Source(ema_name(key), source.part)
    if weights == "ema" and not any(key.startswith("model_ema.diffusion_model") for key in tensors):
        raise UserError(f"{where} has no EMA weights; import its raw weights with --raw")
    transfer(denoiser, ema if weights == "ema" else raw, tensors, where, heads=config.heads)
    return {source.key for table in (raw, ema) for source in table.values()}


def _check_schedule(tensors: Mapping[str, Tensor], model: ModelConfig, where: str) -> None:
    """The schedule that the checkpoint was trained with must be the configuration's."""
    stored = tensors.get("alphas_cumprod")
    if stored is None:
        return
    abar = Schedule(model.schedule).abar
    if stored.shape != abar.shape or not torch.allclose(stored.double(), abar, rtol=1e-4, atol=1e-7):
        raise UserError(
            f"{where}: alphas_cumprod does not follow from the configuration's timesteps, linear_start, linear_end"
        )


def _card(bundle: Bundle, family: Family) -> str:
    origin = {"released": "the released implementation of the method", "ldm": "latent-diffusion"}[family]
    parts = ["autoencoder", *(n for n in ("decoder", "denoiser") if getattr(bundle, n) is not None)]
    source = bundle.meta["imported_from"]
    return (
        f"# {bundle.config.name}\n\nImported from a checkpoint of {origin}: `{source['file']}` "
        f"(SHA-256 {source['sha256']}), {bundle.meta['weights']} weights.\nParts: {', '.join(parts)}.\n\n"
        "The checkpoint's own licence and data apply.\n"
    )
