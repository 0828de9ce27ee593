"""One latent at one output size, drawn window by window: what is written to files of any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.canvas import Facts, Pixels, windows, write_canvas
from pipeline.decoder import ImplicitDecoder
from pipeline.geometry import Size, Window, check_size
from pipeline.images import to_uint8
from pipeline.tiling import TiledDecoder, Tiling
from pipeline.windows import resize_window


class Drawing:
    """latent (1,C,h,w) unscaled, at `size` (H, W); alpha, if given, is the source's (1,1,·,·) uint8, resized alike."""

    def __init__(
        self, decoder: ImplicitDecoder, latent: Tensor, size: Size, tiling: Tiling, alpha: Tensor | None = None
    ) -> None:
        self.size = check_size(size)
        self.alpha = alpha
        self.channels = 3 if alpha is None else 4
        self._decoder = TiledDecoder(decoder, latent, self.size, tiling)

    def pixels(self, window: Window) -> Pixels:
        """uint8 (y1-y0, x1-x0, 3), or 4 with alpha."""
        colour = to_uint8(self._decoder.window(window))[0].permute(1, 2, 0).cpu()
        if self.alpha is not None:
            alpha = resize_window(self.alpha.float(), self.size, window).round().clamp(0, 255).to(torch.uint8)
            colour = torch.cat([colour, alpha[0].permute(1, 2, 0)], dim=-1)
        return colour.numpy()

    def picture(self) -> Image.Image:
        """The whole as a picture in memory: RGB, or RGBA with alpha."""
        whole = np.empty((*self.size, self.channels), np.uint8)
        for y0, x0, y1, x1 in windows(self.size):
            whole[y0:y1, x0:x1] = self.pixels((y0, x0, y1, x1))
        return Image.fromarray(whole)

    def write(self, target: Path, facts: Facts | None = None, on_pixels: Callable[[int], object] | None = None) -> None:
        """The whole as a .png or .tif file, in bounded memory; see `canvas.write_canvas`."""
        write_canvas(target, self.size, self.pixels, channels=self.channels, facts=facts, on_pixels=on_pixels)
