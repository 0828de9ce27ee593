"""LatentZoom: a loaded model. Generate and upscale at any height × width.

Legend: B batch, C latent channels, H/W pixels, h/w latent cells. Images are (B,3,H,W) in [-1, 1].
`latent` is unscaled; `z` is scaled (latent × scale_factor), what the denoiser sees.
"""

from __future__ import annotations

import importlib.metadata
import logging
import operator
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.bleed import visible_colours
from pipeline.canvas import Facts
from pipeline.diffusion import noisy_condition
from pipeline.drawing import Drawing
from pipeline.errors import UserError
from pipeline.extras import missing
from pipeline.geometry import Size, check_size
from pipeline.geometry import target_size as target_size
from pipeline.images import finite, to_pictures
from pipeline.kept import Keep, keep_nothing
from pipeline.networks import MAX_PIXELS as MAX_PIXELS
from pipeline.networks import Networks
from pipeline.networks import OnTile as OnTile
from pipeline.reading import Picture, PictureSource, read_picture
from pipeline.sampling import OnStep, Sampler, SeededNoise, ddim, dpm_solver, one_step
from pipeline.tiling import FEATURE_BYTES, Tiling, tiled_prediction, whole

_LOGGER = logging.getLogger("latentzoom")
MAX_LATENT_CELLS = 1 << 26
"""Largest sampled latent (8192 × 8192 cells)."""
_CONDITION_STREAM = 0x5DEECE66D
"""Added to an image's seed for the noise on its condition."""


class LatentZoom(Networks):
    """A loaded model: the networks of one bundle (`pipeline.networks`), and what people do with them: draw latents,
    generate, upscale. All methods run without gradient. The bundle that is given stays as it is, whatever device, dtype
    and order in memory its networks are used with here."""

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_latents(
        self,
        noise: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        num: int = 1,
        sampler: Sampler = "ddim",
        num_steps: int | None = None,
        eta: float = 0.0,
        seed: int | Sequence[int] = 0,
        latent_size: Size | None = None,
        tiling: Tiling | None = None,
        condition_noise: float = 0.0,
        on_step: OnStep | None = None,
        keep: Keep = keep_nothing,
    ) -> Tensor:
        """Unscaled latents (B,C,h,w). `noise` is z at the noisiest step (drawn when None: image i from seed + i, or
        from seeds[i]); `condition` (scaled) decides B and (h, w) for SR models. The denoiser runs `num_steps` times (50
        unless given; a distilled one once, whatever the sampler); with a tiling, each time on overlapping tiles of the
        latent, whose predictions are blended. condition_noise: strength of the noise added to the condition, at most
        the model's `denoiser.condition_noise`. keep: see `pipeline.kept`."""
        num_steps = self.evaluations(num_steps, 50)
        self._check_condition_noise(condition_noise)
        if self._is_sr() and condition is None:
            raise UserError("this is a super-resolution model: sampling needs a condition; use upscale")
        num = len(noise) if noise is not None else len(condition) if condition is not None else num
        if num < 1:
            raise UserError(f"num = {num} is not allowed; use at least 1")
        seeds = [seed + i for i in range(num)] if isinstance(seed, int) else list(seed)
        if len(seeds) != num:
            raise UserError(f"{len(seeds)} seeds for {num} images")
        given = noise if noise is not None else condition
        if given is not None:
            latent_size = (given.shape[-2], given.shape[-1])
        latent_size = check_size(latent_size or (self.config.latent_size, self.config.latent_size))
        _check_latent_size(latent_size)
        noises = SeededNoise(seeds, (self.config.autoencoder.latent_channels, *latent_size))
        # In half precision the steps themselves stay exact: only networks are rounded.
        exact = torch.promote_types(self.dtype, torch.float32)
        z = noises(self.device, exact) if noise is None else finite(noise, "noise").to(self.device, exact)
        condition = None if condition is None else self._place(finite(condition, "condition"))
        if condition is not None and condition_noise:
            # a stream of its own, so that the latent's noise is the same at every strength
            other = SeededNoise([(s + _CONDITION_STREAM) % (1 << 63) for s in seeds], noises.shape)
            strengths = torch.full((num,), float(condition_noise))
            condition = self._place(noisy_condition(condition, other(self.device, self.dtype), strengths))

        predict_tile = partial(self._predict, strength=condition_noise)
        tiled = tiled_prediction(predict_tile, condition, tiling or whole(latent_size), keep)

        def predict(z_t: Tensor, t: Tensor) -> Tensor:
            return tiled(z_t, t).to(exact)

        if self.config.schedule.distilled_steps:
            z = one_step(predict, self.schedule, z, on_step=on_step)
        elif sampler == "ddim":
            z = ddim(predict, self.schedule, z, num_steps=num_steps, eta=eta, noise=noises, on_step=on_step)
        elif sampler == "dpm++":
            z = dpm_solver(predict, self.schedule, z, num_steps=num_steps, on_step=on_step)
        else:
            raise UserError(f"sampler {sampler!r} is not known; use 'ddim' or 'dpm++'")
        return z / self.config.scale_factor

    # --- what people call ---------------------------------------------------------------------------------------------

    def generate(
        self,
        num: int = 1,
        size: Size | int = (256, 256),
        seed: int | None = 0,
        *,
        sampler: Sampler = "dpm++",
        num_steps: int | None = None,
        eta: float = 0.0,
        latent_size: Size | None = None,
        batch_size: int = 8,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """`num` pictures of size (H, W), or of one number for squares; picture i has seed + i and is the same whatever
        `num` and `batch_size` are. Without a seed (None) one is drawn and said; `info["seed"]` of each picture has its
        own. The latent has the training size unless `latent_size` (h, w) is given: all sizes show the same picture."""
        size = check_size((size, size) if isinstance(size, int) else size)
        seed = _seed_or_new(seed)
        if num < 1:
            raise UserError(f"num = {num} is not allowed; use at least 1")
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size} is not allowed; use at least 1")
        pictures: list[Image.Image] = []
        for start in range(0, num, batch_size):
            seeds = [seed + i for i in range(start, min(start + batch_size, num))]
            latent = self.sample_latents(
                num=len(seeds),
                seed=seeds,
                sampler=sampler,
                num_steps=self.evaluations(num_steps),
                eta=eta,
                latent_size=latent_size,
                on_step=on_step,
            )
            made = to_pictures(self.decode(latent, size))
            for picture, own in zip(made, seeds):
                picture.info["seed"] = own
            pictures += made
        return pictures

    def upscale(
        self,
        image: PictureSource,
        scale: float | None = None,
        *,
        size: Size | None = None,
        seed: int | None = 0,
        sampler: Sampler = "dpm++",
        num_steps: int | None = None,
        eta: float = 0.0,
        tile: int = 0,
        condition_noise: float = 0.0,
        on_step: OnStep | None = None,
    ) -> Image.Image:
        """One picture (a Pillow image, a file, its bytes or an array) enlarged by a real factor or to `size` (H, W).
        Grey stays grey, alpha, colour profile and EXIF are kept. Without a seed (None) one is drawn and said.
        num_steps: evaluations of the denoiser; as the model has them when None: 20, or 1 of a distilled one.

        SR models draw the latent by diffusion from the condition, or with num_steps = 0 render the condition itself
        where their decoder was trained for it (`UserError` where it was not): that is one pass and closest to the
        truth, diffusion adds plausible detail. Models for direct super-resolution and for generation have no such
        choice and render the condition. condition_noise: where the model was trained so (`denoiser.condition_noise`),
        noise on the condition: more detail of its own, less trust in what the input shows. Large pictures are worked on
        in tiles, see `tiling`. For results too large for memory use `drawing(latent_of(image), size).write(file)`."""
        picture, seed = read_picture(image), _seed_or_new(seed)
        size = target_size(picture.size, scale, size)
        self._check_fits(size)
        if picture.has_more:
            _LOGGER.warning("the picture has several frames or pages; only the first is enlarged")
        latent = self.latent_of(
            picture,
            seed=seed,
            sampler=sampler,
            num_steps=num_steps,
            eta=eta,
            tile=tile,
            condition_noise=condition_noise,
            on_step=on_step,
        )
        drawing = self.drawing_of(picture, latent, size, tile=tile)
        made = drawing.picture(Facts(icc=picture.icc, exif=picture.exif))
        made.info["seed"] = seed
        return made

    def view(self, image: PictureSource, *, height: int = 640) -> Any:
        """For notebooks: the page of `latentzoom serve` inline, with `image` under this model, to zoom into. height: of
        the frame, in pixels. The page's server runs in this process, on this machine's own address. Raises `UserError`
        where latentzoom is installed without it."""
        found = importlib.metadata.entry_points(group="latentzoom.viewers")
        if not found:
            raise UserError("this installation has no viewer; install latentzoom whole (pip install -e .)")
        try:
            viewer = next(iter(found)).load()
        except ModuleNotFoundError as error:
            raise UserError(missing(error) or str(error)) from error
        return viewer(self, image, height)

    def latent_of(
        self,
        image: PictureSource,
        *,
        seed: int = 0,
        sampler: Sampler = "dpm++",
        num_steps: int | None = None,
        eta: float = 0.0,
        tile: int = 0,
        condition_noise: float = 0.0,
        on_step: OnStep | None = None,
        on_tile: OnTile | None = None,
        keep: Keep = keep_nothing,
    ) -> Tensor:
        """The latent (1,C,h,w), unscaled, that `upscale` decodes: it is the same for every scale. on_tile: called while
        the picture is encoded; keep: what keeps tiles of a long work, see `kept`."""
        self._check_condition_noise(condition_noise, num_steps)
        picture = read_picture(image)
        tiling, factor = self.tiling(tile), self.config.autoencoder.factor
        is_direct = self.renders_condition(num_steps)
        if self._is_sr():  # before the hours that encoding may take
            height, width = self.high_resolution(picture.size)
            _check_latent_size((height // factor, width // factor))
        condition = self.condition(visible_colours(picture), tiling, keep=keep, on_tile=on_tile)
        if is_direct:
            return condition.div_(self.config.scale_factor)
        return self.sample_latents(
            condition=condition,
            seed=seed,
            sampler=sampler,
            num_steps=self.evaluations(num_steps),
            eta=eta,
            tiling=tiling,
            condition_noise=condition_noise,
            on_step=on_step,
            keep=keep,
        )

    def evaluations(self, num_steps: int | None, default: int = 20) -> int:
        """Evaluations of the denoiser for one picture: those asked for, by default those that it was distilled to, or
        `default`. `UserError` where a distilled one is asked for another number."""
        _check_steps(num_steps)
        own = self.config.schedule.distilled_steps
        if own and num_steps not in (None, own):
            raise UserError(
                f"num_steps = {num_steps} is not allowed: this model was distilled to {own} step; give {own}, or leave "
                "it out"
            )
        return own or (default if num_steps is None else num_steps)

    def renders_condition(self, num_steps: int | None) -> bool:
        """Whether an enlargement renders its condition, without diffusion: all models but those for super-resolution
        do, and these with num_steps = 0. `UserError` where the decoder was not trained for that."""
        _check_steps(num_steps)
        if not self._is_sr() or num_steps != 0:
            return not self._is_sr()
        if self.config.decoder.inputs == "latent":
            raise UserError(
                "num_steps = 0 renders the condition itself, and this model's decoder was not trained for that; "
                "use 1 or more (20 is the default), or train the decoder with model.decoder.inputs=both"
            )
        return True

    def drawing(
        self,
        latent: Tensor,
        size: Size,
        *,
        tile: int = 0,
        alpha: Tensor | None = None,
        is_grey: bool = False,
        cache_bytes: int = FEATURE_BYTES,
    ) -> Drawing:
        """Unscaled latent (1,C,h,w) at `size`, to be drawn window by window or written to a file of any size.
        cache_bytes: of the features of large latents, which are kept from window to window."""
        tiling = self.tiling(tile)
        return Drawing(self._decoder(), self._place(latent), size, tiling, alpha, is_grey, cache_bytes=cache_bytes)

    def drawing_of(
        self, picture: Picture, latent: Tensor, size: Size, *, tile: int = 0, cache_bytes: int = FEATURE_BYTES
    ) -> Drawing:
        """The same for the enlargement of `picture`, whose alpha and greys it keeps."""
        return Drawing(
            self._decoder(),
            self._place(latent),
            size,
            self.tiling(tile),
            picture.opacity(),
            picture.is_grey,
            picture.is_colourless,
            cache_bytes,
        )

    def tiling(self, tile: int = 0) -> Tiling:
        """Tiles of `tile` latent cells, by default twice the training size, that overlap by a quarter. Latents of at
        most one tile are worked on whole."""
        multiple = self.denoiser.multiple if self._is_sr() and self.denoiser is not None else 1
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < 0:
            raise UserError(f"tile = {tile!r} is not allowed; use a whole number, {2 * multiple} cells or more")
        tile = -(-(tile or 2 * self.config.latent_size) // multiple) * multiple
        return Tiling(tile, tile // 4 // multiple * multiple, multiple)

    # ------------------------------------------------------------------------------------------------------------------

    def _check_condition_noise(self, strength: float, num_steps: int | None = None) -> None:
        most = self.config.denoiser.condition_noise
        if strength == 0 or (0 < strength <= most and num_steps != 0):
            return
        why = f"this model was trained with {'up to ' if most else ''}{most:g}"
        if most and num_steps == 0:
            why = "it is for sampling, and num_steps = 0 renders the condition itself"
        raise UserError(f"condition_noise = {strength:g} is not allowed; {why}")


def _seed_or_new(seed: int | None) -> int:
    if seed is None:
        seed = secrets.randbelow(1 << 31)
        _LOGGER.warning("seed %d was drawn; give seed=%d for the same picture again", seed, seed)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise UserError(f"seed = {seed!r} is not allowed; use a whole number, or None for a new one")
    return operator.index(seed)


def _check_steps(num_steps: int | None) -> None:
    is_whole = hasattr(num_steps, "__index__") and not isinstance(num_steps, bool)
    if num_steps is not None and not (is_whole and num_steps >= 0):
        raise UserError(f"num_steps = {num_steps!r} is not allowed; use a whole number")


def _check_latent_size(size: Size) -> None:
    if size[0] * size[1] > MAX_LATENT_CELLS:
        raise UserError(f"a latent of {size[0]}x{size[1]} cells is not allowed; use at most {MAX_LATENT_CELLS} cells")
