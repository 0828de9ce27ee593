"""Eight small pictures as a shard set: enough for a step of training."""

import numpy as np
from PIL import Image

from orchestration.cli import main


def make_shards(folder):
    """`shards` below `folder`, of `photos` beside it → its path."""
    (folder / "photos").mkdir()
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "photos" / f"{i}.png")
    assert main(["preprocess", "folder", str(folder / "photos"), str(folder / "shards"), "--size", "32"]) == 0
    return str(folder / "shards")
