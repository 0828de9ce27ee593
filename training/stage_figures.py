"""What each stage measures on held-out samples. Pictures are compared as the product's evaluation does, on 8 bits.

Legend: B batch, C latent channels, H/W pixels, h/w latent cells. z are scaled latents, t (B,) time steps.

More than 350 lines: the figures of all stages side by side, measured alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.autoencoder import latent_of
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser
from pipeline.config import ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.denoiser import Denoiser
from pipeline.diffusion import Schedule
from pipeline.images import from_uint8, to_uint8
from pipeline.metrics.lpips import Lpips, random_lpips
from pipeline.metrics.lpips_package import find_lpips, load_packaged_lpips
from pipeline.metrics.psnr import psnr
from pipeline.resize import resize
from pipeline.sampling import dpm_solver
from pipeline.views import view_of
from training.config import AlignStage, DecoderStage, DenoiserStage, DistillStage
from training.context import Context, frozen_autoencoder, require_parts
from training.held_out import StageFigures
from training.latents import scaled_latents, shown_condition
from training.losses import diffusion_weight, min_snr_weight, per_sample
from training.micro_batch import MicroBatch
from training.precision import autocast, frozen_precision
from training.reconstruction import JointFirstStage, Reconstruction, joint_first_stage
from training.targets import draw_target, render_target
from training.zoom import condition_image

LEVELS = 8
"""Buckets of noise: equal ranges of t, level 1 the least noisy."""
SCALES = (2, 3, 4)
"""Enlargements at which direct super-resolution is measured."""
_HELD_OUT = 0
"""The step under which held-out noise is drawn; training's begin at 1."""
_MOST_DB = 100.0
"""PSNR of equal pictures."""

Values = dict[str, Tensor]


def three_sizes(model: ModelConfig) -> tuple[int, ...]:
    """Sides at which pictures are compared: the latent's, the geometric middle and the image's own."""
    small, large = model.latent_size, model.image_size
    return tuple(sorted({small, round((small * large) ** 0.5), large}))


class Pictures:
    """PSNR and LPIPS of pictures in [-1,1] under names such as "psnr_x64"; LPIPS where the pictures are large enough
    for it, by AlexNet's weights or, where the package that holds them is missing, by the stand-in of evaluation."""

    def __init__(self, context: Context, settings: dict[str, int]) -> None:
        """settings: what a comparison is called ("x64") → the pictures' side in pixels."""
        found = find_lpips("alexnet") is not None
        self._make: Callable[[], Lpips] = (lambda: load_packaged_lpips("alexnet")) if found else random_lpips
        self._lpips: Lpips | None = None
        self.device, self.lpips_name = context.world.device, "lpips" if found else "lpips_random_vgg"
        large = [name for name, side in settings.items() if side >= Lpips.min_size]
        self.names = (*(f"psnr_{s}" for s in settings), *(f"{self.lpips_name}_{s}" for s in large))

    def compare(self, made: Tensor, truth: Tensor, setting: str) -> Values:
        """(B,3,H,W) twice → values (B,)."""
        ours, theirs = to_uint8(made), to_uint8(truth)
        values: Values = {f"psnr_{setting}": psnr(ours, theirs).clamp(max=_MOST_DB)}
        if (name := f"{self.lpips_name}_{setting}") in self.names:
            if self._lpips is None:
                self._lpips = self._make().to(self.device).eval().requires_grad_(False)
            values[name] = self._lpips(ours, theirs)
        return values


def autoencoder_figures(context: Context) -> StageFigures:
    """Reconstructions from the posterior's mean, and what is left of their errors at smaller sizes."""
    model, config = context.model, context.config
    sizes = three_sizes(model)
    pictures = Pictures(context, {f"x{side}": side for side in sizes})

    def measure(network: nn.Module, micro: MicroBatch) -> Values:
        assert isinstance(network, Reconstruction) and micro.pixels is not None
        with autocast(config, context.world.device):
            made = network.autoencoder.decode(network.autoencoder.encode(micro.pixels)).float()
        values = {"l1": per_sample(made, micro.pixels, "l1")}
        for side in sizes:
            values |= pictures.compare(_at(made, side), _at(micro.pixels, side), f"x{side}")
        return values

    def whole(network: nn.Module) -> Bundle:
        assert isinstance(network, Reconstruction)
        return Bundle(model, network.autoencoder)

    return StageFigures(
        build=lambda: Reconstruction(build_autoencoder(model)),
        names=("l1", *pictures.names),
        measure=measure,
        best_by=f"psnr_x{model.image_size}",
        whole=whole,
        latents=False,
    )


def joint_figures(context: Context) -> StageFigures:
    """Renderings of the posterior's mean at three sizes."""
    model = context.model
    names, compare = _renderings(context, "l1")

    def measure(network: nn.Module, micro: MicroBatch) -> Values:
        assert isinstance(network, JointFirstStage) and micro.pixels is not None
        with autocast(context.config, context.world.device):
            latent = network.autoencoder.encode(micro.pixels)
        return compare(network.decoder, latent, micro.pixels)

    def whole(network: nn.Module) -> Bundle:
        assert isinstance(network, JointFirstStage)
        return Bundle(model, network.autoencoder, network.decoder)

    return StageFigures(
        build=lambda: joint_first_stage(model),
        names=names,
        measure=measure,
        best_by=f"psnr_x{model.image_size}",
        whole=whole,
        latents=False,
    )


def decoder_figures(context: Context) -> StageFigures:
    """Renderings of the cached latents at three sizes; for direct super-resolution enlargements by three scales."""
    model, config = context.model, context.config
    assert isinstance(config, DecoderStage)
    if model.task == "direct":
        return _enlargements(context, config)
    names, compare = _renderings(context, config.loss)

    def measure(network: nn.Module, micro: MicroBatch) -> Values:
        assert isinstance(network, ImplicitDecoder) and micro.pixels is not None and micro.latents is not None
        return compare(network, latent_of(micro.latents, model.autoencoder), micro.pixels)

    return StageFigures(
        build=lambda: build_decoder(model),
        names=names,
        measure=measure,
        best_by=f"psnr_x{model.image_size}",
        whole=partial(_with_decoder, context),
    )


def _with_decoder(context: Context, network: nn.Module) -> Bundle:
    assert isinstance(network, ImplicitDecoder)
    return Bundle(context.model, frozen_autoencoder(context), network)


def _renderings(
    context: Context, loss: str
) -> tuple[tuple[str, ...], Callable[[ImplicitDecoder, Tensor, Tensor], Values]]:
    """Names, and (decoder, unscaled latent, pixels) → values: the mean error of three sizes, PSNR and LPIPS of each."""
    sizes = three_sizes(context.model)
    pictures = Pictures(context, {f"x{side}": side for side in sizes})

    def compare(decoder: ImplicitDecoder, latent: Tensor, pixels: Tensor) -> Values:
        values: Values = {loss: torch.zeros(len(pixels), device=pixels.device)}
        with autocast(context.config, context.world.device):
            features = decoder.features(latent)
        for side in sizes:
            with autocast(context.config, context.world.device):
                made = decoder.render(features, (side, side)).float()
            truth = _at(pixels, side)
            values[loss] = values[loss] + per_sample(made, truth, "l2" if loss == "l2" else "l1") / len(sizes)
            values |= pictures.compare(made, truth, f"x{side}")
        return values

    return (loss, *pictures.names), compare


def _enlargements(context: Context, config: DecoderStage) -> StageFigures:
    """Direct super-resolution: 8-bit inputs that are smaller by each scale."""
    model = context.model
    cells = {scale: model.image_size // scale for scale in SCALES}
    pictures = Pictures(context, {f"scale{scale}": scale * num for scale, num in cells.items()})
    encoder = view_of(frozen_autoencoder(context)).to(context.world.device)

    def measure(network: nn.Module, micro: MicroBatch) -> Values:
        assert micro.pixels is not None
        values: Values = {config.loss: torch.zeros(len(micro.pixels), device=context.world.device)}
        for scale, num in cells.items():
            side = scale * num
            truth = micro.pixels[:, :, :side, :side]
            low = from_uint8(to_uint8(resize(truth, (num, num))))
            latent = encoder.encode(condition_image(low, model.autoencoder.factor, model.condition_resize))
            with autocast(config, context.world.device):
                made = network(latent, (side, side)).float()
            values[config.loss] = values[config.loss] + per_sample(made, truth, config.loss) / len(cells)
            values |= pictures.compare(made, truth, f"scale{scale}")
        return values

    return StageFigures(
        build=lambda: build_decoder(model),
        names=(config.loss, *pictures.names),
        measure=measure,
        best_by=f"psnr_scale{SCALES[-1]}",
        whole=partial(_with_decoder, context),
        latents=False,
    )


def denoiser_figures(context: Context) -> StageFigures:
    """The stage's loss at each level of noise, and their mean."""
    model, config = context.model, context.config
    assert isinstance(config, DenoiserStage)
    schedule = Schedule(model.schedule)

    def loss_at(network: nn.Module, micro: MicroBatch, level: int) -> Tensor:
        z0, condition = scaled_latents(micro, model, config.seed if config.sample_latents else None, _HELD_OUT)
        t, eps = _noise_of(micro, schedule, z0, config.seed, level)
        shown = shown_condition(micro, condition, model, config.seed, _HELD_OUT)
        with autocast(config, context.world.device):
            prediction = network(schedule.add_noise(z0, eps, t), t, *shown).float()
        errors = per_sample(prediction, schedule.target(z0, eps, t), config.loss)
        if config.min_snr_gamma:
            errors = errors * min_snr_weight(schedule.snr(t), model.schedule.prediction, config.min_snr_gamma)
        return errors

    return _by_level(context, loss_at, pixels=False)


def align_figures(context: Context) -> StageFigures:
    """The stage's loss, eq. (9), at each level of noise, and their mean. Each level has its own drawn target."""
    model, config = context.model, context.config
    assert isinstance(config, AlignStage)
    bundle = require_parts(context.bundle, "align")
    assert bundle.decoder is not None
    schedule = Schedule(model.schedule)
    decoder = view_of(bundle.decoder).to(context.world.device).train()  # as the stage has it
    targets = [draw_target(config, model, -level) for level in range(1, LEVELS + 1)]

    def loss_at(network: nn.Module, micro: MicroBatch, level: int) -> Tensor:
        assert micro.pixels is not None
        z0, condition = scaled_latents(micro, model, config.seed if config.sample_latents else None, _HELD_OUT)
        t, eps = _noise_of(micro, schedule, z0, config.seed, level)
        shown = shown_condition(micro, condition, model, config.seed, _HELD_OUT)
        z_t = schedule.add_noise(z0, eps, t)
        with autocast(config, context.world.device):
            z0_pred = schedule.to_x0(z_t, network(z_t, t, *shown).float(), t)
        target = targets[level - 1]
        with frozen_precision(config, context.world.device):
            rendered = render_target(decoder, z0_pred / model.scale_factor, target, config.context_cells).float()
        errors = config.lambda_dm * per_sample(z0_pred, z0, config.loss)
        errors = errors + config.lambda_recon * per_sample(rendered, target.truth(micro.pixels), config.loss)
        return errors * diffusion_weight(schedule.snr(t), config.loss, config.weight_clip)

    return _by_level(context, loss_at, pixels=True)


def _by_level(
    context: Context, loss_at: Callable[[nn.Module, MicroBatch, int], Tensor], *, pixels: bool
) -> StageFigures:
    levels = range(1, LEVELS + 1)

    def measure(network: nn.Module, micro: MicroBatch) -> Values:
        values = {f"loss_level{level}": loss_at(network, micro, level) for level in levels}
        return {"loss": torch.stack(list(values.values())).mean(dim=0), **values}

    return StageFigures(
        build=lambda: build_denoiser(context.model),
        names=("loss", *(f"loss_level{level}" for level in levels)),
        measure=measure,
        best_by="loss",
        whole=partial(_with_denoiser, context),
        pixels=pixels,
    )


def _noise_of(micro: MicroBatch, schedule: Schedule, z0: Tensor, seed: int, level: int) -> tuple[Tensor, Tensor]:
    """t (B,) uniform in the level's range of 0..T-1 and eps like z0 (B,C,h,w): each sample's own, always the same."""
    first, last = (schedule.config.num_steps * edge // LEVELS for edge in (level - 1, level))
    draws = micro.draws(seed, "held out", level)
    return first + draws.integers(max(1, last - first)), draws.normal(tuple(z0.shape[1:])).to(z0)


def _with_denoiser(context: Context, network: nn.Module) -> Bundle:
    assert isinstance(network, Denoiser)
    bundle = require_parts(context.bundle, context.stage)
    return Bundle(context.model, bundle.autoencoder, bundle.decoder, network)


def distill_figures(context: Context) -> StageFigures:
    """The stage's loss and its terms, and PSNR and LPIPS of one step beside the teacher's, at the image's own size.

    A student knows one level of noise only, the last. The teacher's latents are made once."""
    model, config, device = context.model, context.config, context.world.device
    assert isinstance(config, DistillStage)
    bundle = require_parts(context.bundle, "distill")
    assert bundle.decoder is not None and bundle.denoiser is not None
    decoder = view_of(bundle.decoder).to(device).train()
    schedule, path = Schedule(model.schedule), Schedule(bundle.config.schedule)
    side = model.image_size
    target = draw_target(config, model, -1)
    pictures = Pictures(context, {f"x{side}": side})
    taught: dict[int, Tensor] = {}

    def teach(noise: Tensor, first: int, *shown: Tensor | None) -> Tensor:
        if first not in taught:
            assert bundle.denoiser is not None
            teacher = view_of(bundle.denoiser).to(device)

            def predict(z_t: Tensor, t: Tensor) -> Tensor:
                with autocast(config, device):
                    return teacher(z_t, t, *shown).float()

            taught[first] = dpm_solver(predict, path, noise, num_steps=config.teacher_steps).cpu()
        return taught[first].to(device)

    def measure(network: nn.Module, micro: MicroBatch) -> Values:
        assert micro.pixels is not None
        z, condition = scaled_latents(micro, model, None, _HELD_OUT)
        noise = micro.draws(config.seed, "trajectory", _HELD_OUT).normal(tuple(z.shape[1:])).to(z)
        shown = shown_condition(micro, condition, model, config.seed, _HELD_OUT)
        z_0 = teach(noise, micro.index.start, *shown)
        t = torch.full((len(noise),), model.schedule.num_steps - 1, dtype=torch.int64, device=device)
        with autocast(config, device):
            z0_pred = schedule.to_x0(noise, network(noise, t, *shown).float(), t)

        def render(z: Tensor) -> tuple[Tensor, Tensor]:
            """The stage's window, and the whole picture."""
            latent = z / model.scale_factor
            with frozen_precision(config, device):
                window = render_target(decoder, latent, target, config.context_cells).float()
                return window, decoder.render(decoder.features(latent), (side, side)).float()

        (window, made), (taught_window, teachers) = render(z0_pred), render(z_0)
        values = {
            "loss_latent": per_sample(z0_pred, z_0, config.loss),
            "loss_image": per_sample(window, taught_window, config.loss),
            "loss_truth": per_sample(window, target.truth(micro.pixels), config.loss),
        }
        weights = (config.lambda_latent, config.lambda_image, config.lambda_truth)
        loss = torch.stack([weight * value for weight, value in zip(weights, values.values())]).sum(dim=0)
        compared = pictures.compare(made, micro.pixels, f"x{side}")
        beside = pictures.compare(teachers, micro.pixels, f"x{side}")
        return {"loss": loss, **values, **compared, **{f"teacher_{name}": value for name, value in beside.items()}}

    terms = ("loss", "loss_latent", "loss_image", "loss_truth")
    return StageFigures(
        build=lambda: build_denoiser(model),
        names=(*terms, *pictures.names, *(f"teacher_{name}" for name in pictures.names)),
        measure=measure,
        best_by="loss",
        whole=partial(_with_denoiser, context),
    )


def _at(image: Tensor, side: int) -> Tensor:
    """(B,3,H,W) → (B,3,side,side), with anti-aliasing."""
    return image if image.shape[-1] == side else resize(image, (side, side))
