"""Pictures of how training goes, drawn on the main worker with the averaged weights and fixed seeds and samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.autoencoder import Autoencoder, latent_of
from pipeline.bundle import Bundle
from pipeline.decoder import ImplicitDecoder
from pipeline.denoiser import Denoiser
from pipeline.images import from_uint8, to_uint8
from pipeline.model import LatentZoom
from pipeline.resize import resize
from training.context import Context, frozen_autoencoder
from training.session import Session
from training.zoom import condition_image

_GAP = 2


class Grids:
    """Holds a few fixed samples, of held-out images where the shard set has any, and draws them when asked."""

    def __init__(self, context: Context, num: int = 4, sampler_steps: int = 25) -> None:
        self.context, self.num, self.sampler_steps = context, num, sampler_steps
        self._fixed: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    @torch.no_grad()
    def autoencoder(self, session: Session, network: Autoencoder | None) -> None:
        """Truth above reconstruction."""
        if network is None:
            return
        pixels, _, _ = self._samples(latents=False)
        made = network.decode(network.encode(pixels))
        session.reporter.images(session.step, "reconstruction", tile([pixels, made]))

    @torch.no_grad()
    def reconstruction(self, session: Session, decoder: ImplicitDecoder | None) -> None:
        """Truth and rendering side by side at three sizes: the latent's, the geometric middle and the image's own."""
        if decoder is None:
            return
        pixels, stored, _ = self._samples(latents=True)
        assert stored is not None
        self._three_renderings(session, pixels, latent_of(stored, self.context.model.autoencoder), decoder)

    @torch.no_grad()
    def joint(self, session: Session, autoencoder: Autoencoder | None, decoder: ImplicitDecoder | None) -> None:
        """As `reconstruction`, with latents of the encoder that is being trained."""
        if autoencoder is None or decoder is None:
            return
        pixels, _, _ = self._samples(latents=False)
        self._three_renderings(session, pixels, autoencoder.encode(pixels), decoder)

    def _three_renderings(self, session: Session, pixels: Tensor, latent: Tensor, decoder: ImplicitDecoder) -> None:
        features = decoder.features(latent)
        rows = []
        for side in self._three_sizes():
            rows += [resize(pixels, (side, side)), decoder.render(features, (side, side))]
        session.reporter.images(session.step, "reconstruction", tile(rows))

    @torch.no_grad()
    def enlargement(self, session: Session, decoder: ImplicitDecoder | None) -> None:
        """Direct super-resolution at ×2 and ×4: bicubic, ours and truth above each other."""
        if decoder is None:
            return
        pixels, _, _ = self._samples(latents=False)
        rows: list[Tensor] = []
        for scale in (2, 4):
            side = self.context.model.image_size // scale
            low = from_uint8(to_uint8(resize(pixels, (side, side))))
            autoencoder = frozen_autoencoder(self.context).to(low.device)
            factor, mode = self.context.model.autoencoder.factor, self.context.model.condition_resize
            latent = autoencoder.encode(condition_image(low, factor, mode))
            size = (pixels.shape[-2], pixels.shape[-1])
            rows += [resize(low, size), decoder(latent, size), pixels]
        session.reporter.images(session.step, "enlargement", tile(rows))

    @torch.no_grad()
    def samples(self, session: Session, denoiser: Denoiser | None, decoder: ImplicitDecoder | None = None) -> None:
        """Samples of fixed seeds at three sizes; for SR low-res | bicubic | ours | truth."""
        if denoiser is None:
            return
        bundle = self.context.bundle
        assert bundle is not None
        model = LatentZoom(
            Bundle(self.context.model, bundle.autoencoder, decoder or bundle.decoder, denoiser),
            self.context.world.device,
        )
        rows = self._upscaled(model) if self.context.model.task == "sr" else self._generated(model)
        if rows:
            session.reporter.images(session.step, "samples", tile(rows))

    @torch.no_grad()
    def distilled(
        self, session: Session, student: Denoiser | None, decoder: ImplicitDecoder, teacher: Denoiser
    ) -> None:
        """Low-res | bicubic | teacher | one step | truth, from the same noise."""
        bundle = self.context.bundle
        if student is None or bundle is None:
            return
        made = []
        for config, denoiser in ((bundle.config, teacher), (self.context.model, student)):
            parts = Bundle(config, bundle.autoencoder, decoder, denoiser)
            made.append(self._upscaled(LatentZoom(parts, self.context.world.device)))
        (low, bicubic, taught, truth), (_, _, ours, _) = made
        session.reporter.images(session.step, "samples", tile([low, bicubic, taught, ours, truth]))

    def _generated(self, model: LatentZoom) -> list[Tensor]:
        latent = model.sample_latents(num=self.num, seed=0, sampler="dpm++", num_steps=self.sampler_steps)
        if model.decoder is None:
            return [model.autoencoder.decode(latent)] if model.autoencoder.has_decoder else []
        features = model.features(latent)
        return [model.render(features, (side, side)) for side in self._three_sizes()]

    def _upscaled(self, model: LatentZoom) -> list[Tensor]:
        pixels, _, stored = self._samples(latents=True)
        assert stored is not None
        config = self.context.model
        full = (config.image_size, config.image_size)
        low = resize(pixels, (config.lr_size, config.lr_size))
        condition = latent_of(stored, config.autoencoder) * config.scale_factor
        num_steps = model.config.schedule.distilled_steps or self.sampler_steps
        latent = model.sample_latents(condition=condition, seed=0, sampler="dpm++", num_steps=num_steps)
        ours = model.decode(latent, full) if model.decoder is not None else model.autoencoder.decode(latent)
        return [resize(low, full, "nearest"), resize(low, full), ours, pixels]

    def _three_sizes(self) -> tuple[int, int, int]:
        small, large = self.context.model.latent_size, self.context.model.image_size
        return small, round((small * large) ** 0.5), large

    def _samples(self, *, latents: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """pixels (B,3,H,W) in [-1,1], stored latents and conditions of the same few samples every time."""
        if self._fixed is None:
            splits = self.context.manifest.splits
            split = "val" if splits.get("val", 0) >= 1 else "train"
            num = min(self.num, splits[split])
            loader = self.context.loader(pixels=True, latents=latents, batch_size=num, split=split, main_only=True)
            batch = next(iter(loader))
            loader.close()
            assert batch.pixels is not None
            device = self.context.world.device
            self._fixed = (
                batch.pixels.to(device).float() / 127.5 - 1.0,
                None if batch.latents is None else batch.latents.to(device),
                None if batch.condition is None else batch.condition.to(device),
            )
        return self._fixed


def tile(rows: list[Tensor]) -> np.ndarray:
    """Rows of images (B,3,H,W) in [-1,1], each row of its own size, as one uint8 picture (H', W', 3), white between."""
    pictures = [(row.detach().float().cpu().clamp(-1, 1) + 1).mul(127.5).round().byte().numpy() for row in rows]
    height = sum(p.shape[2] + _GAP for p in pictures)
    width = max(p.shape[0] * (p.shape[3] + _GAP) for p in pictures)
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    y = 0
    for picture in pictures:
        for i, image in enumerate(picture):
            x = i * (picture.shape[3] + _GAP)
            canvas[y : y + picture.shape[2], x : x + picture.shape[3]] = image.transpose(1, 2, 0)
        y += picture.shape[2] + _GAP
    return canvas
