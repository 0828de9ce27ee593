"""One latent at one output size, drawn window by window: what is written to files of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.canvas import DEFAULT_QUALITY, Draw, Facts, Pixels, draw_whole, write_canvas
from pipeline.decoder import ImplicitDecoder
from pipeline.feature_cache import num_bytes
from pipeline.geometry import Size, Window, check_size
from pipeline.images import finite, to_uint8
from pipeline.tiling import FEATURE_BYTES, TiledDecoder, Tiling
from pipeline.windows import resize_window

_LUMA = (0.299, 0.587, 0.114)


class Drawing:
    """latent (1,C,h,w) unscaled, at `size` (H, W); alpha, if given, is the source's (1,1,·,·) uint8, resized alike.
    is_grey: one channel instead of three. is_colourless: three that are equal, without the tint that a network gives
    to grey."""

    def __init__(
        self,
        decoder: ImplicitDecoder,
        latent: Tensor,
        size: Size,
        tiling: Tiling,
        alpha: Tensor | None = None,
        is_grey: bool = False,
        is_colourless: bool = False,
        cache_bytes: int = FEATURE_BYTES,
    ) -> None:
        self.size = check_size(size)
        self.alpha, self.is_grey, self.is_colourless = alpha, is_grey, is_grey or is_colourless
        self.channels = (1 if is_grey else 3) + (0 if alpha is None else 1)
        self._decoder = TiledDecoder(decoder, latent, self.size, tiling, cache_bytes=cache_bytes)

    def at(self, size: Size) -> Drawing:
        """The same at another size. Features are shared, by several threads if need be, and made once."""
        other = copy.copy(self)
        other.size = check_size(size)
        other._decoder = self._decoder.resized(size)
        return other

    @property
    def cells(self) -> Size:
        """(h, w) of the latent."""
        return self._decoder.cells

    @property
    def feature_bytes(self) -> int:
        """Memory of the features that are kept."""
        return self._decoder.feature_bytes

    @property
    def num_bytes(self) -> int:
        """Memory of the latent and of the features that are kept, at most `cache_bytes` of them."""
        return self._decoder.num_bytes + (0 if self.alpha is None else num_bytes(self.alpha))

    def missing(self, window: Window | None = None) -> list[Window]:
        """The tiles of features that a window (the whole without) needs and that are not kept: see `make`."""
        return self._decoder.missing(window)

    def make(self, tile: Window) -> None:
        """Make one of `missing`, so that drawing does not. Several threads may, each another one."""
        self._decoder.make(tile)

    def pixels(self, window: Window) -> Pixels:
        """uint8 (y1-y0, x1-x0, channels): grey or RGB, then alpha."""
        image = self._decoder.window(window)
        if self.is_colourless:
            colour = finite(image, "the picture").float().clamp(-1, 1)  # as three channels would be cut
            image = (colour * colour.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
        pixels = to_uint8(image)[0].permute(1, 2, 0).contiguous().cpu()
        if self.is_colourless and not self.is_grey:
            pixels = pixels.expand(-1, -1, 3)
        if self.alpha is not None:
            alpha = resize_window(self.alpha.float(), self.size, window).round().clamp(0, 255).to(torch.uint8)
            pixels = torch.cat([pixels, alpha[0].permute(1, 2, 0)], dim=-1)
        return pixels.numpy()

    def picture(self, facts: Facts | None = None) -> Image.Image:
        """The whole as a picture in memory: L, LA, RGB or RGBA, with profile and EXIF in its `info`."""
        whole = draw_whole(self.size, self.pixels, self.channels)
        image = Image.fromarray(whole[..., 0] if self.channels == 1 else whole)
        if facts is not None:
            image.info.update({"icc_profile": facts.icc} if facts.icc else {}, **dict(facts.text))
            if facts.exif:
                image.info["exif"] = facts.exif
        return image

    def write(
        self,
        target: Path,
        facts: Facts | None = None,
        on_pixels: Callable[[int], object] | None = None,
        *,
        quality: int = DEFAULT_QUALITY,
        draw: Draw | None = None,
    ) -> None:
        """The whole as a file of any format of `formats.FORMATS`; see `canvas.write_canvas`. draw: instead of
        `pixels`, something that gives the same."""
        write_canvas(
            target,
            self.size,
            draw or self.pixels,
            channels=self.channels,
            facts=facts,
            quality=quality,
            on_pixels=on_pixels,
        )
