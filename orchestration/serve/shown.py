"""A picture as it was given: its own pixels at any size, and what it is shrunk to first."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict

import numpy as np
import torch
from PIL import Image

from pipeline.canvas import Pixels
from pipeline.reading import Picture
from pipeline.sizes import Size, Window
from pipeline.windows import resize_window

OVERVIEW = 4
"""A picture that is shown at this part of its size or less is reduced whole."""
SMALL_KEPT = 16
"""Sizes at which a reduced picture is kept: more than a pyramid has levels that small."""


def shrunk(picture: Picture, by: int) -> Picture:
    """Reduced by anti-aliased bicubic to 1/`by` of height and width; 1 leaves it."""
    if by == 1:
        return picture
    height, width = shrunk_size(picture.size, by)

    def reduced(image: Image.Image) -> Image.Image:
        return image.resize((width, height), Image.Resampling.BICUBIC)

    alpha = None if picture.alpha is None else reduced(picture.alpha)
    return dataclasses.replace(picture, image=reduced(picture.image), alpha=alpha)


def shrunk_size(size: Size, by: int) -> Size:
    return max(1, round(size[0] / by)), max(1, round(size[1] / by))


class Shown:
    """A picture's own pixels, at any size, by anti-aliased bicubic: grey or RGB, then alpha."""

    def __init__(self, picture: Picture) -> None:
        self._image, self._alpha, self.size = picture.image, picture.alpha, picture.size
        planes = [np.asarray(image) for image in (picture.image, picture.alpha) if image is not None]
        planes = [plane if plane.ndim == 3 else plane[..., None] for plane in planes]
        self._pixels = torch.from_numpy(np.concatenate(planes, axis=2)).permute(2, 0, 1)[None]
        self.channels = int(self._pixels.shape[1])
        self._small: OrderedDict[Size, Pixels] = OrderedDict()
        self._reducing = threading.Lock()

    def window(self, size: Size, window: Window) -> Pixels:
        """uint8 (y1-y0, x1-x0, c)."""
        if max(size) * OVERVIEW > max(self.size):
            return resize_window(self._pixels, size, window)[0].permute(1, 2, 0).contiguous().numpy()
        with self._reducing:  # much smaller than the picture: made once, whole
            whole = self._small.get(size)
            if whole is None:
                whole = self._small[size] = self._reduced(size)
                while len(self._small) > SMALL_KEPT:
                    self._small.popitem(last=False)
        return whole[window[0] : window[2], window[1] : window[3]]

    def _reduced(self, size: Size) -> Pixels:
        images = [image for image in (self._image, self._alpha) if image is not None]
        made = [np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0)) for image in images]
        return np.concatenate([plane if plane.ndim == 3 else plane[..., None] for plane in made], axis=2)

    @property
    def num_bytes(self) -> int:
        return 2 * self._pixels.numel() + sum(pixels.nbytes for pixels in list(self._small.values()))
