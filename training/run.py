"""One stage from start to bundle: check everything, train (or continue), save.

run folder:  run.json  checkpoints/  metrics.jsonl  grids/  [profile/]  bundle/  bundle-best/  averages/
             result.json (written last)
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, TextIO

import torch

from pipeline import storage
from pipeline.bundle import Bundle, load_bundle, save_bundle
from pipeline.config import ModelConfig, to_dict
from pipeline.errors import UserError, without_secrets
from pipeline.migrations import CONFIG_VERSION
from pipeline.redact import plain_without_secrets
from preprocess.shards.manifest import Manifest, load_manifest
from training.agreement import check_use, take_over
from training.alarm import shared_alarm
from training.checkpoint import free_space_error
from training.commit import source_commit
from training.config import (
    AlignStage,
    AutoencoderStage,
    DecoderStage,
    DenoiserStage,
    DistillStage,
    Preset,
    StageConfig,
    is_joint,
    with_scale_factor,
)
from training.context import Context, frozen_autoencoder, require_parts
from training.engine import accumulation_steps
from training.estimate import check_memory
from training.held_out import SPLIT
from training.identity import part_hashes
from training.migrations import as_begun
from training.newest import NEWEST, trained_bundle
from training.quality import MakeQuality
from training.reporter import Reporter
from training.request import TrainRequest
from training.result import Trained, TrainResult, result_url, stored_result
from training.shared_folder import require_shared_folder
from training.starts import ignored, with_starts
from training.stopping import Stop
from training.targets import size_range, window_side
from training.tuning import tune
from training.world import World, current_world
from training.zoom import smallest_zoom

_log = logging.getLogger("latentzoom")


def train(
    stage: str,
    preset: Preset,
    *,
    data: str,
    run_dir: str,
    bundle: str | None = None,
    reporters: list[Callable[[], Reporter]] | None = None,
    use_deepspeed: bool = False,
    device: str | None = None,
    stop_requested: Callable[[], Stop] = lambda: Stop.NO,
    progress_stream: TextIO | None = None,
    places: Mapping[str, str] | None = None,
    profile: int = 0,
    make_quality: MakeQuality | None = None,
) -> TrainResult:
    """Train one stage on this worker; every worker of a world calls it with the same arguments, those of a
    `TrainRequest`. device: "cpu", "cuda", or None for a GPU where there is one. An error on one worker soon ends the
    others too.

    A finished run returns its stored result at once; an interrupted one continues from its newest sound checkpoint.
    Raises `UserError` for what can be mended, before training starts where it can be known then, and `Stopped`.
    """
    request = TrainRequest(
        stage=stage,
        preset=preset,
        data=data,
        run_dir=run_dir,
        bundle=bundle,
        reporters=reporters or (),
        use_deepspeed=use_deepspeed,
        stop_requested=stop_requested,
        progress_stream=progress_stream,
        places=places or {},
        profile=profile,
        make_quality=make_quality,
    )
    world = current_world(device)
    with shared_alarm(world):
        return _train(make_context(request, world))


def _train(context: Context) -> TrainResult:
    world, run_dir = context.world, context.run_dir
    require_shared_folder(run_dir, world)
    digest = context.identity.digest()
    done = world.broadcast(stored_result(run_dir, digest) if world.is_main else None)
    if done is not None:
        return done
    if world.is_main:
        storage.write_json(storage.join(run_dir, "run.json"), _description(context))
    tune(context.config, world.device)
    loop = importlib.import_module(f"training.stages.{context.stage}")
    trained: Trained = loop.train(context)
    return world.broadcast(_finish(context, trained, digest) if world.is_main else None)


def make_context(request: TrainRequest, world: World) -> Context:
    """Resolve and check everything a stage needs."""
    stage, preset = request.stage, request.preset
    config, asked, kept = as_begun(stage, preset.stage(stage), preset.model, request.run_dir, log=world.is_main)
    check_stage(stage, asked)
    manifest = load_manifest(request.data)
    given = load_bundle(request.bundle) if request.bundle else None
    bundle, origins = with_starts(stage, config, asked, given, request.places)
    model = resolve_model(stage, asked, manifest, bundle, origins)
    for line in ignored(stage, config, asked, model, is_bundle_given=given is not None) if world.is_main else ():
        _log.warning("%s", line)
    if stage == "distill":
        model = student_model(model)
    context = Context(
        request=request,
        config=config,
        model=model,
        data=storage.absolute(request.data),
        manifest=manifest,
        run_dir=storage.absolute(request.run_dir),
        bundle=bundle,
        world=world,
        part_hashes=part_hashes(bundle),
        origins=origins,
        as_begun=kept,
    )
    check(context)
    return context


def student_model(model: ModelConfig) -> ModelConfig:
    """The model of a one-step student. It predicts z0 (or, as its teacher does, v): at the noisiest step a prediction
    of eps says nothing about the latent (Salimans & Ho, "Progressive Distillation", ICLR 2022, section 4)."""
    prediction = "x0" if model.schedule.prediction == "eps" else model.schedule.prediction
    schedule = dataclasses.replace(model.schedule, prediction=prediction, distilled_steps=1)
    return dataclasses.replace(model, schedule=schedule)


def resolve_model(
    stage: str, model: ModelConfig, manifest: Manifest, bundle: Bundle | None, goes_on: Collection[str] = ()
) -> ModelConfig:
    """The preset's model in agreement with the bundle: its parts keep their settings, its denoiser the scale factor and
    the schedule that it was trained with (`take_over`). Without a denoiser, or where one is trained anew, the scale
    factor is the measured one. goes_on: parts that the stage trains from the bundle's weights."""
    if stage == "autoencoder":
        return model
    if model.task != "direct":  # its decoder sees unscaled latents, and there is no other part
        model = with_scale_factor(model, manifest.scale_factor)
    return model if bundle is None else take_over(stage, model, bundle, goes_on)


def check_stage(stage: str, model: ModelConfig) -> None:
    """`UserError` where the model has no such stage."""
    if stage == "distill" and model.task != "sr":
        raise UserError(
            f"stage distill is for super-resolution by diffusion (task 'sr'), and this model's task is {model.task!r}"
        )
    if model.task == "direct" and stage in ("denoiser", "align"):
        raise UserError(
            f"stage {stage}: a model for direct super-resolution has no denoiser; it is ready after `decoder`"
        )
    if model.autoencoder.kind == "identity" and stage == "autoencoder":
        raise UserError("stage autoencoder: the kind 'identity' has no weights to train; begin with `decoder`")


def require_beginning(stage: str, model: ModelConfig, bundle: Bundle | None) -> None:
    """`UserError` where the bundle lacks a part that the stage builds on."""
    brings_its_own = stage == "decoder" and model.autoencoder.kind == "identity" and bundle is None
    if stage != "autoencoder" and not brings_its_own:
        require_parts(bundle, stage)


def check(context: Context) -> None:
    """Everything that can be known before training starts; the first problem is a `UserError`."""
    stage, config, model, manifest = context.stage, context.config, context.model, context.manifest
    require_beginning(stage, model, context.bundle)
    accumulation_steps(config, context.world.size)
    if manifest.size != model.image_size:
        raise UserError(
            f"{context.data} holds {manifest.size}-pixel images and the model is for {model.image_size}; "
            "preprocess at that size, or set model.image_size"
        )
    if not manifest.splits.get("train"):
        raise UserError(f"{context.data} has no samples in split 'train'")
    is_drawn = model.task == "direct" and isinstance(config, DecoderStage) and config.conditions == "drawn"
    if stage != "autoencoder" and not is_drawn:
        _check_latents(context)
    if stage != "autoencoder":
        check_use(stage, model, context.bundle)
    if isinstance(config, (DecoderStage, AlignStage, DistillStage)) and not is_drawn:
        size_range(config, model, max(_own_sizes(context), default=0))
    if isinstance(config, DecoderStage) and config.perceptual_weight:
        _check_windows(context, config, is_drawn)
    if isinstance(config, AutoencoderStage) and is_joint(config):
        if model.autoencoder.kind != "kl":
            raise UserError(
                f"autoencoder.decoder = 'implicit' is for the kind 'kl', whose posterior is sampled; this model's is "
                f"{model.autoencoder.kind!r}"
            )
        size_range(config, model)
    elif isinstance(config, AutoencoderStage) and config.crop % model.autoencoder.factor:
        raise UserError(
            f"autoencoder.crop = {config.crop} is not a multiple of {model.autoencoder.factor}, the factor by which "
            "the autoencoder shrinks images; use a multiple, or 0 for whole images"
        )
    if isinstance(config, DenoiserStage) and config.min_snr_gamma and model.schedule.zero_terminal_snr:
        raise UserError(
            f"denoiser.min_snr_gamma = {config.min_snr_gamma:g} gives no weight to the last step of a schedule with "
            "zero_terminal_snr, where sampling begins; set one of them only"
        )
    if config.early_stop_patience and not manifest.splits.get(SPLIT):
        raise UserError(
            f"{stage}.early_stop_patience = {config.early_stop_patience} needs held-out figures; {context.data} has "
            f"no split {SPLIT!r}; preprocess with --val-fraction 0.02, or set it to 0"
        )
    splits = context.request.use_deepspeed
    held = config if splits else dataclasses.replace(config, zero_stage=0)
    check_memory(stage, held, model, context.world.size, context.world.device)
    if problem := free_space_error(context.run_dir, 64 << 20):
        raise UserError(f"{problem}; free some, or choose another run folder")


def _check_latents(context: Context) -> None:
    manifest, model = context.manifest, context.model
    if manifest.autoencoder_identity is None:
        raise UserError(f"{context.data} holds pixels only; preprocess it again with --autoencoder")
    identity = frozen_autoencoder(context).identity()
    if manifest.autoencoder_identity != identity:
        raise UserError(
            f"{context.data} was encoded by autoencoder {manifest.autoencoder_identity[:12]}…, the bundle holds "
            f"{identity[:12]}…; preprocess again with this bundle"
        )
    if model.task == "direct":
        if not manifest.lr_sizes or manifest.condition_cells != "input":
            raise UserError(
                f"{context.data} has no conditions for direct super-resolution; preprocess with --lr-sizes 32,64 "
                "--condition-cells input, or set decoder.conditions=drawn"
            )
        _check_enlargement(context)
    elif model.task == "sr" and (context.stage != "decoder" or model.decoder.inputs == "both"):
        _check_conditions(context)


def _check_conditions(context: Context) -> None:
    """The shards' super-resolution conditions are those that the model will be given when it is used."""
    manifest, model = context.manifest, context.model
    if model.lr_size not in manifest.lr_sizes:
        raise UserError(
            f"{context.data} has no {model.lr_size}-pixel conditions (it has {manifest.lr_sizes}); preprocess again"
        )
    if manifest.condition_cells != "image":
        raise UserError(
            f"{context.data} holds conditions with one cell for each low-resolution pixel, for direct super-"
            "resolution; preprocess again with --condition-cells image"
        )
    _check_enlargement(context)


def _own_sizes(context: Context) -> list[int]:
    """Pixels from which targets begin by default where conditions are cached: their own, drawn for every step."""
    return context.manifest.lr_sizes if context.model.task == "direct" else []


def _check_windows(context: Context, config: DecoderStage, is_drawn: bool) -> None:
    """LPIPS shrinks windows on its way and leaves nothing of those that are too small."""
    model = context.model
    low = 0 if is_drawn else size_range(config, model, min(_own_sizes(context), default=0))[0]
    side = smallest_zoom(config, model.image_size) if is_drawn else window_side(config, model, low)
    needed = 16 if config.lpips_weights in ("", "random", "vgg16") else 32
    if side < needed:
        raise UserError(
            f"decoder.perceptual_weight = {config.perceptual_weight:g} compares windows of at least {needed} pixels, "
            f"and this run would draw some of {side}; use a larger crop or larger targets"
        )


def _check_enlargement(context: Context) -> None:
    manifest, model = context.manifest, context.model
    if manifest.transform["condition_resize"] != model.condition_resize:
        raise UserError(
            f"{context.data} holds conditions enlarged by {manifest.transform['condition_resize']!r}, the model is for "
            f"{model.condition_resize!r}; preprocess again with --condition-resize {model.condition_resize}"
        )


def _finish(context: Context, trained: Trained, digest: str) -> TrainResult:
    """Save the bundle: the incoming parts and, in place of the trained one, its averaged weights."""
    result, weights = trained
    assert weights is not None
    url = storage.join(context.run_dir, NEWEST)
    save_bundle(url, trained_bundle(context, weights, result.steps))
    result = dataclasses.replace(result, bundle=url, config_digest=digest)
    storage.write_json(result_url(context.run_dir), dataclasses.asdict(result))
    return result


def _description(context: Context) -> dict[str, Any]:
    config: StageConfig = context.config
    return {
        "stage": context.stage,
        "config_version": CONFIG_VERSION,
        "settings": plain_without_secrets(to_dict(config), without_secrets),
        **({"as_begun": context.as_begun} if context.as_begun else {}),
        "started_from": context.started_from(),
        "model": to_dict(context.model),
        "data": without_secrets(context.data),
        "manifest": context.manifest.digest,
        "autoencoder": context.manifest.autoencoder_identity,
        "workers": context.world.size,
        "engine": "deepspeed" if context.request.use_deepspeed else "torch",
        "commit": source_commit(),
        "torch": torch.__version__,
        "environment": {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ},
    }
