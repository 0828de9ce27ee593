"""diffusers folders → bundles: an AutoencoderKL or VQModel, a UNet2DModel, or a pipeline folder that holds them.

Our modules carry diffusers' parameter names, so only the configurations need translating.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pipeline import storage
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser
from pipeline.config import AutoencoderConfig, DenoiserConfig, ModelConfig, ScheduleConfig, from_dict
from pipeline.errors import UserError, first_line
from pipeline.exporting.front_matter import card_of_bundle
from pipeline.importing.checkpoint import read_checkpoint
from pipeline.importing.content import format_of
from pipeline.importing.diffusers_files import local_or_hub, weights_in
from pipeline.importing.names import Source
from pipeline.importing.settings import Section, base_and_mult, decoder_like
from pipeline.importing.transfer import check_left_over, transfer
from pipeline.migrations import MODEL_MIGRATIONS, migrated

_AUTOENCODER_CLASSES = ("AutoencoderKL", "VQModel")
_AUTOENCODER_FOLDERS = ("vae", "vqvae", ".")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_DEFAULT_SCALE = 0.18215
"""What diffusers takes when an autoencoder's configuration names no scaling_factor."""


def import_diffusers(
    source: str, *, unet: str | None = None, revision: str | None = None, name: str | None = None
) -> Bundle:
    """Read a diffusers folder into a bundle (without an implicit decoder, unless it is one of our own pipelines).

    source: a local folder, or the id of a repository on the Hugging Face hub (downloaded and cached by
    huggingface_hub). It holds an autoencoder, or a pipeline with `vae` or `vqvae`, `unet` and `scheduler` folders; or
    it is the weight file of an autoencoder beside its config.json. A folder of `latentzoom export --to diffusers` gives
    the whole bundle back. Of a pipeline whose U-Net takes text or other
    conditions (Stable Diffusion and its like), the autoencoder alone is taken, and `meta` says so.
    unet: another folder or id that holds the U-Net (and, beside it or in it, a scheduler_config.json).
    Raises `UserError` naming what is missing, left over or not supported."""
    weights = _weight_file(source)
    root = weights.parent if weights else local_or_hub(source, revision)
    if (own := _own_index(root)) is not None and not unet:
        return _import_own(root, own, source, revision, name)
    folder = next((root / f for f in _AUTOENCODER_FOLDERS if _class_of(root / f) in _AUTOENCODER_CLASSES), None)
    if folder is None:
        raise UserError(f"{source} holds no AutoencoderKL or VQModel: looked in {', '.join(_AUTOENCODER_FOLDERS)}")
    unet_root = local_or_hub(unet, revision) if unet else root
    unet_folder = next((unet_root / f for f in ("unet", ".") if "UNet" in _class_of(unet_root / f)), None)
    if unet and unet_folder is None:
        raise UserError(f"{unet} holds no UNet2DModel")
    left_out = ""
    if not unet and unet_folder is not None and _class_of(unet_folder) != "UNet2DModel":
        left_out, unet_folder = _class_of(unet_folder), None
    label = name or (weights.stem if weights else Path(source.rstrip("/")).name)
    model = _model_config(label, _config(folder), unet_folder)
    bundle = Bundle(model, build_autoencoder(model))
    _fill(bundle.autoencoder, weights or weights_in(folder), {"quantizer.": "quantize."})
    if unet_folder is not None:
        bundle.denoiser = build_denoiser(model)
        _fill(bundle.denoiser, weights_in(unet_folder), {"unet.": ""})
    bundle.meta = {"imported_from": {"format": "diffusers", "source": source, "revision": revision}}
    note = ""
    if left_out:
        bundle.meta["imported_from"]["left_out"] = left_out
        note = f"Its denoiser ({left_out}) takes text or other conditions and was left out.\n\n"
    bundle.card = (
        f"# {label}\n\nImported from the diffusers folder `{source}`.\n\n{note}Its own licence and data apply.\n"
    )
    return bundle


def _own_index(root: Path) -> dict[str, Any] | None:
    """The description of the model in a pipeline folder that `pipeline.exporting.diffusers_folder` wrote."""
    file = root / "model_index.json"
    index = storage.read_json(str(file)) if file.is_file() else {}
    is_own = isinstance(index, dict) and "LatentZoomPipeline" in index.get("_class_name", ())
    return index.get("model") if is_own else None


def _import_own(root: Path, own: dict[str, Any], source: str, revision: str | None, name: str | None) -> Bundle:
    """A bundle with all its parts: the names of the weights are ours."""
    fields = dict(own)
    try:
        version, has_decoder = int(fields.pop("config_version")), bool(fields.pop("autoencoder_has_decoder"))
        meta = dict(fields.pop("meta"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root}/model_index.json is damaged: {first_line(error)}") from error
    fields = migrated(fields, version, MODEL_MIGRATIONS, f"{root}/model_index.json")
    config = from_dict(ModelConfig, fields, where=f"{root}/model_index.json: model")
    config = replace(config, name=name) if name else config
    bundle = Bundle(config, build_autoencoder(config, has_decoder=has_decoder), build_decoder(config))
    assert bundle.decoder is not None
    _fill(bundle.decoder, weights_in(root / "decoder"), {})
    if config.autoencoder.kind != "identity":
        _fill(bundle.autoencoder, weights_in(root / "vae"), {"quantizer.": "quantize."})
    if (root / "unet").is_dir():
        bundle.denoiser = build_denoiser(config)
        _fill(bundle.denoiser, weights_in(root / "unet"), {"unet.": ""})
    bundle.meta = {**meta, "imported_from": {"format": "diffusers", "source": source, "revision": revision}}
    card = root / "README.md"
    bundle.card = card_of_bundle(card.read_text()) if card.is_file() else f"# {config.name}\n"
    return bundle


def _weight_file(source: str) -> Path | None:
    """`source` where it is one file: an autoencoder's weights with their config.json beside them."""
    file = Path(source)
    if not file.is_file():
        return None
    if format_of(source) == "json":
        raise UserError(f"{source} is a JSON file; give its folder, or the file of the weights")
    if _class_of(file.parent) in _AUTOENCODER_CLASSES:
        return file
    keys = set(read_checkpoint(source))
    if any(key.startswith("encoder.down_blocks.") for key in keys):
        todo = "put the config.json of its repository beside it"
        raise UserError(f"{source} holds the weights of a diffusers autoencoder, without a configuration; {todo}")
    if any(key.removeprefix("first_stage_model.").startswith("encoder.down.") for key in keys):
        todo = f"use `latentzoom import ldm {source} --model-config its.yaml`"
        raise UserError(f"{source} is a checkpoint with CompVis' names (Stable Diffusion in one file); {todo}")
    raise UserError(f"{source} holds no autoencoder; its first tensor is {min(keys, default='none')}")


def _class_of(folder: Path) -> str:
    path = folder / "config.json"
    return str(_config(folder).values.get("_class_name", "")) if path.is_file() else ""


def _config(folder: Path) -> Section:
    path = str(folder / "config.json")
    format_of(path)  # names what is none
    values = storage.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a configuration")
    return Section(values, path)


def _scheduler(unet_folder: Path) -> ScheduleConfig:
    places = [unet_folder.parent / "scheduler", unet_folder, unet_folder.parent]
    path = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()), None)
    if path is None:
        raise UserError(f"{unet_folder}: no scheduler_config.json in it or beside it, so its noise schedule is unknown")
    section = Section(storage.read_json(str(path)), str(path))
    section.require("trained_betas", None)
    if section.value("beta_schedule", str, "linear") != "scaled_linear":
        raise UserError(
            f"{path}: beta_schedule {section.values.get('beta_schedule')!r}; only 'scaled_linear' is supported"
        )
    names: dict[str, Literal["eps", "x0", "v"]] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
    prediction = section.value("prediction_type", str, "epsilon")
    if prediction not in names:
        raise UserError(f"{path}: prediction_type {prediction!r} is not one of {', '.join(names)}")
    return ScheduleConfig(
        num_steps=section.value("num_train_timesteps", int, 1000),
        beta_start=section.value("beta_start", float, 0.0001),
        beta_end=section.value("beta_end", float, 0.02),
        prediction=names[prediction],
        zero_terminal_snr=section.value("rescale_betas_zero_snr", bool, False),
    )


def _autoencoder_config(section: Section) -> AutoencoderConfig:
    kind: Literal["kl", "vq"] = "kl" if section.values["_class_name"] == "AutoencoderKL" else "vq"
    for field, supported in {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "norm_type": "group",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "lookup_from_codebook": False,
    }.items():
        section.require(field, supported)
    channels = section.value("latent_channels", int)
    if section.values.get("vq_embed_dim") is not None:
        section.require("vq_embed_dim", channels)
    base, width_mult = base_and_mult(section.integers("block_out_channels"))
    levels = _attending(section, "down_block_types", "DownEncoderBlock2D", "AttnDownEncoderBlock2D")
    up_levels = _attending(section, "up_block_types", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    _require_mirrored(section, levels, up_levels, len(width_mult))
    return AutoencoderConfig(
        kind=kind,
        latent_channels=channels,
        base_width=base,
        width_mult=width_mult,
        num_res_blocks=section.value("layers_per_block", int, 1),
        attention_levels=levels,
        mid_attention=section.value("mid_block_add_attention", bool, True),
        num_embeddings=section.value("num_vq_embeddings", int, 256),
        norm_groups=section.value("norm_num_groups", int, 32),
    )


def _denoiser_config(section: Section) -> DenoiserConfig:
    if section.values["_class_name"] != "UNet2DModel":
        raise UserError(
            f"{section.where}: {section.values['_class_name']} takes text or other conditions; not supported"
        )
    for field, supported in {
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2D",
        "downsample_padding": 1,
        "downsample_type": "conv",
        "upsample_type": "conv",
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "default",
        "add_attention": True,
        "attn_norm_num_groups": None,
        "class_embed_type": None,
        "num_class_embeds": None,
    }.items():
        section.require(field, supported)
    base, width_mult = base_and_mult(section.integers("block_out_channels"))
    levels = _attending(section, "down_block_types", "DownBlock2D", "AttnDownBlock2D")
    _require_mirrored(
        section, levels, _attending(section, "up_block_types", "UpBlock2D", "AttnUpBlock2D"), len(width_mult)
    )
    return DenoiserConfig(
        base_width=base,
        width_mult=width_mult,
        num_res_blocks=section.value("layers_per_block", int, 2),
        attention_factors=tuple(2**level for level in levels),
        head_channels=section.value("attention_head_dim", int, 8),
        norm_groups=section.value("norm_num_groups", int, 32),
        dropout=section.value("dropout", float, 0.0),
    )


def _model_config(name: str, section: Section, unet_folder: Path | None) -> ModelConfig:
    """section: the autoencoder's configuration."""
    autoencoder = _autoencoder_config(section)
    factor = autoencoder.factor
    model = ModelConfig(
        name=name,
        image_size=max(section.value("sample_size", int, 256) // factor, 1) * factor,
        scale_factor=section.value("scaling_factor", float, _DEFAULT_SCALE),
        autoencoder=autoencoder,
        decoder=decoder_like(autoencoder),
    )
    if unet_folder is None:
        return model
    for field in ("shift_factor", "latents_mean", "latents_std"):
        section.require(field, None)
    unet = _config(unet_folder)
    denoiser = _denoiser_config(unet)
    for field in ("in_channels", "out_channels"):
        unet.require(field, autoencoder.latent_channels)
    image_size = unet.value("sample_size", int) * factor
    return replace(model, image_size=image_size, denoiser=denoiser, schedule=_scheduler(unet_folder))


def _attending(section: Section, field: str, plain: str, attending: str) -> tuple[int, ...]:
    """Positions of the attending blocks; any third kind of block is refused."""
    kinds = section.value(field, list)
    strange = [kind for kind in kinds if kind not in (plain, attending)]
    if strange:
        raise UserError(f"{section.where}.{field}: {strange[0]!r} is not supported; use {plain} or {attending}")
    return tuple(i for i, kind in enumerate(kinds) if kind == attending)


def _require_mirrored(section: Section, down: tuple[int, ...], up: tuple[int, ...], num_levels: int) -> None:
    same_length = all(len(section.value(f, list)) == num_levels for f in ("down_block_types", "up_block_types"))
    if not same_length or {num_levels - 1 - i for i in up} != set(down):
        raise UserError(f"{section.where}: up_block_types must mirror down_block_types, one per block_out_channels")


def _fill(module: nn.Module, path: Path, prefixes: dict[str, str]) -> None:
    """Load the weights at `path`; `prefixes` renames ours to diffusers'."""
    tensors = {_modern(key): value for key, value in read_checkpoint(str(path)).items()}
    sources = {name: Source(_prefixed(name, prefixes)) for name in module.state_dict()}
    transfer(module, sources, tensors, str(path))
    check_left_over(set(tensors) - {source.key for source in sources.values()}, str(path))


def _prefixed(name: str, prefixes: dict[str, str]) -> str:
    for ours, theirs in prefixes.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _modern(key: str) -> str:
    """Attention layers of older folders are called query, key, value and proj_attn."""
    stem, _, kind = key.rpartition(".")
    head, _, last = stem.rpartition(".")
    is_old = ".attentions." in key and last in _OLD_ATTENTION
    return f"{head}.{_OLD_ATTENTION[last]}.{kind}" if is_old else key
