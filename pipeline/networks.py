"""The networks of one bundle on one device: each part on its own, as pure functions of tensors.

Legend: B batch, C latent channels, H/W pixels, h/w latent cells. Images are (B,3,H,W) in [-1, 1].
`latent` is unscaled; `z` is scaled (latent × scale_factor), what the denoiser sees.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from pipeline.bundle import PARTS, Bundle, load_bundle
from pipeline.config import ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.device import checked_device
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from pipeline.geometry import Size, Window, check_size, check_window
from pipeline.images import finite
from pipeline.kept import Keep, keep_nothing
from pipeline.plain_trunk import PlainFeatureDecoder
from pipeline.starter import Look, starter_path
from pipeline.tiling import Tiling, blend_tiles, whole
from pipeline.views import view_of
from pipeline.windows import drawn_size, reduced_window, resize_window

OnTile = Callable[[int, int], object]
"""Called with (tiles done, tiles in all)."""
MAX_PIXELS = 1 << 28
"""Largest image held in memory at once (16 384²); larger ones are decoded window by window."""


class Networks:
    """The networks of one bundle on one device. All methods run without gradient. The bundle that is given stays as it
    is, whatever device, dtype and order in memory its networks are used with here.

    dtype: what the networks compute in. Half precision leaves exact what costs little: the sampler's steps, and where
    the decoder reads the picture itself (autoencoder "identity") and has no norms, all but D_phi's residual blocks."""

    def __init__(self, bundle: Bundle, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        parts = {
            name: view_of(part)  # whoever made the bundle may be training them
            for name in PARTS
            if (part := getattr(bundle, name)) is not None
        }
        self.bundle = dataclasses.replace(bundle, **parts)
        self.config: ModelConfig = bundle.config
        dtype = _checked_dtype(dtype)
        trunk = self.bundle.decoder.trunk if self.bundle.decoder is not None else None
        if self.config.autoencoder.kind == "identity" and isinstance(trunk, PlainFeatureDecoder):
            trunk.block_dtype = dtype if dtype.itemsize < 4 else None
            dtype = torch.promote_types(dtype, torch.float32)
        self.device, self.dtype = checked_device(device), dtype
        self.schedule = Schedule(bundle.config.schedule)
        for part in parts.values():
            part.to(self.device, dtype)
        self.autoencoder, self.decoder = self.bundle.autoencoder, self.bundle.decoder
        self.denoiser = self.bundle.denoiser
        # Convolutions run faster so: on a CPU the denoiser by a tenth, on CUDA all of them in half precision. Without
        # norms in between, a decoder's features come out in the order that its head reads.
        is_cuda = self.device.type == "cuda"
        is_plain = self.decoder is not None and self.decoder.trunk.halo is not None
        decoder = self.decoder if is_cuda or is_plain else None
        for part in (self.denoiser, self.autoencoder if is_cuda else None, decoder):
            if part is not None:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._run_denoiser: Callable[..., Tensor] | None = self.denoiser

    @classmethod
    def load(
        cls, url: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a bundle folder (path or any fsspec URL). Raises `UserError` when it is missing or damaged."""
        if not isinstance(url, (str, os.PathLike)):
            raise UserError(f"{url!r} is no address of a bundle; give a folder or a URL")
        url = os.fspath(url)
        if url.startswith("models:/"):
            raise UserError(f"{url} is an address of a registry: use orchestration.registry.load({str(url)!r})")
        checked_device(device)  # before anything is fetched
        return cls(load_bundle(url), device, dtype)

    @classmethod
    def starter(
        cls, look: Look = "faithful", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """The small super-resolution model that comes with the package, without network: `upscale` by any factor.

        look: "faithful", closest to the truth pixel by pixel, or "sharp", crisper for the eye. Raises `UserError` for
        another look and for a damaged installation."""
        return cls(load_bundle(starter_path(look)), device, dtype)

    def compile(self) -> None:
        """Compile the denoiser, on CUDA with CUDA graphs. The first call for each latent size takes a minute or more;
        later ones are faster."""
        if self.denoiser is None:
            raise UserError("this bundle has no denoiser to compile")
        is_cuda = self.device.type == "cuda"
        compiled = torch.compile(self.denoiser, mode="reduce-overhead" if is_cuda else "default")
        # A CUDA graph writes every result to the same place: keep each one.
        self._run_denoiser = (lambda *arguments: compiled(*arguments).clone()) if is_cuda else compiled

    def run_denoiser_by(self, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
        """Have `wrap(denoiser)` called in the denoiser's place, such as what evaluates the steps of several threads
        together. It takes z_t (B,C,h,w), t (B,), the condition or None, and the strength of noise on it if there is."""
        if self._run_denoiser is not None:
            self._run_denoiser = wrap(self._run_denoiser)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image (B,3,H,W), H and W multiples of f → unscaled latent (B,C,h,w)."""
        return self.autoencoder.encode(self._place(finite(image, "image")))

    @torch.no_grad()
    def features(self, latent: Tensor) -> Tensor:
        """Unscaled latent (B,C,h,w) → D_phi's features (B,ch,h,w); reuse them for several sizes with `render`."""
        return self._decoder().features(self._place(latent))

    @torch.no_grad()
    def render(self, features: Tensor, size: Size, window: Window | None = None, *, chunk: int | None = None) -> Tensor:
        """Features → image (B,3,*size), or the window (y0,x0,y1,x1) of it. With fewer pixels than cells it is drawn
        larger and reduced."""
        size = check_size(size)
        y0, x0, y1, x1 = check_window(window, size)
        self._check_fits((y1 - y0, x1 - x0))
        decoder = self._decoder()
        channels = decoder.head.feature_channels
        if features.ndim != 4 or features.shape[1] != channels:
            raise UserError(f"features have shape {tuple(features.shape)}; expected (B, {channels}, h, w)")
        table = decoder.prepare(finite(features, "feature map"))
        drawn = drawn_size(size, (features.shape[2], features.shape[3]))

        def draw(part: Window) -> Tensor:
            return decoder.render_table(table, drawn, part, chunk=chunk)

        return reduced_window(draw, drawn, size, (y0, x0, y1, x1))

    def decode(self, latent: Tensor, size: Size, window: Window | None = None, *, chunk: int | None = None) -> Tensor:
        """Unscaled latent (B,C,h,w) → image (B,3,*size), or the window (y0,x0,y1,x1) of it; eq. (6)."""
        return self.render(self.features(latent), size, window, chunk=chunk)

    @torch.no_grad()
    def denoise(self, z_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """z_t (B,C,h,w) and condition scaled, t (B,) → eps_pred (B,C,h,w), whatever the model predicts itself."""
        condition = None if condition is None else finite(condition, "condition")
        self.schedule.check_t(t, batch=len(z_t))
        prediction = self._predict(finite(z_t, "z_t"), t, condition)
        return self.schedule.to_eps(self._place(z_t), prediction, t.to(self.device))

    @torch.no_grad()
    def condition(
        self,
        image_lr: Tensor,
        tiling: Tiling | None = None,
        *,
        keep: Keep = keep_nothing,
        on_tile: OnTile | None = None,
    ) -> Tensor:
        """SR condition: LR image (B,3,h_lr,w_lr) → resized to the HR size, encoded, scaled: (B,C,h,w). The HR size is
        the LR size × image_size / lr_size, rounded to a multiple the networks accept. With a tiling, the enlarged image
        is made and encoded tile by tile; each is a piece for `keep`, and `on_tile` is called after it."""
        if image_lr.ndim != 4 or image_lr.shape[1] != 3 or 0 in image_lr.shape:
            raise UserError(f"low-resolution image has shape {tuple(image_lr.shape)}; expected (B, 3, h, w)")
        size = self.high_resolution((image_lr.shape[2], image_lr.shape[3]))
        f, mode = self.config.autoencoder.factor, self.config.condition_resize
        image_lr = self._place(finite(image_lr, "low-resolution image"))
        if self.config.autoencoder.kind == "identity" and size == tuple(image_lr.shape[-2:]):  # it is its own latent
            if on_tile is not None:
                on_tile(1, 1)
            return image_lr.clamp(-1, 1).mul_(self.config.scale_factor)

        def encode(cells: Window) -> Tensor:
            window = (cells[0] * f, cells[1] * f, cells[2] * f, cells[3] * f)
            if mode == "nearest":
                return self.encode(resize_window(image_lr, size, window, "nearest_released"))
            return self.encode(resize_window(image_lr, size, window).clamp(-1, 1))

        latent_size = size[0] // f, size[1] // f
        tiling = tiling or whole(latent_size)
        num_tiles, done = len(tiling.windows(latent_size)), itertools.count(1)

        def encoded(cells: Window) -> Tensor:
            piece = keep(f"encoded-{cells[0]}-{cells[1]}", lambda: encode(cells)).to(self.device)
            if on_tile is not None:
                on_tile(next(done), num_tiles)
            return piece

        return blend_tiles(latent_size, tiling, encoded) * self.config.scale_factor

    def high_resolution(self, lr_size: Size) -> Size:
        """Pixels (H, W) at which an LR image of `lr_size` is encoded. For a generation model the factor is f, so that
        the latent has as many cells as the LR image has pixels."""
        factor = self.config.image_size / self.config.lr_size if self.config.lr_size else self.config.autoencoder.factor
        multiple = self.config.autoencoder.factor * (self.denoiser.multiple if self._is_sr() and self.denoiser else 1)
        height, width = (max(1, round(side * factor / multiple)) * multiple for side in lr_size)
        return height, width

    def _check_fits(self, size: Size) -> None:
        if size[0] * size[1] > MAX_PIXELS:
            raise UserError(f"an image of {size[0]}x{size[1]} pixels does not fit at once; decode it in windows")

    def _is_sr(self) -> bool:
        return self.config.task == "sr"

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _decoder(self) -> ImplicitDecoder:
        if self.decoder is None:
            raise UserError("this bundle has no implicit decoder yet; train the stage `decoder` first")
        return self.decoder

    def _predict(self, z_t: Tensor, t: Tensor, condition: Tensor | None, strength: float = 0.0) -> Tensor:
        if self.config.task == "direct":
            raise UserError(
                "this model is for direct super-resolution: it has no denoiser and draws nothing; use upscale"
            )
        if self._run_denoiser is None:
            raise UserError("this bundle has no denoiser yet; train the stage `denoiser` first")
        condition = self._place(condition) if condition is not None else None
        if not strength:
            return self._run_denoiser(self._place(z_t), t.to(self.device), condition)
        strengths = torch.full((len(z_t),), strength, device=self.device)
        return self._run_denoiser(self._place(z_t), t.to(self.device), condition, strengths)


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Also by its name. `UserError` for numbers that no network computes in."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(found, torch.dtype) or found not in allowed:
        raise UserError(f"dtype = {dtype!r} is not allowed; use torch.float32, torch.bfloat16 or torch.float16")
    return found
