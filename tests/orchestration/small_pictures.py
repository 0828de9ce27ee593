"""Small smooth pictures for tests that need a folder of images."""

from pathlib import Path

import numpy as np
from PIL import Image


def make_pictures(folder: Path, num: int, *, cells: int = 5, side: int = 40) -> Path:
    """`num` square PNG files of `side` pixels in a new folder: noise of `cells` x `cells`, enlarged."""
    folder.mkdir()
    for number in range(num):
        coarse = np.random.default_rng(number).integers(0, 255, (cells, cells, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return folder
