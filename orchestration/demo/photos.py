"""The demo's pictures: photographs that come inside scikit-image, scikit-learn and Matplotlib.

Training and held-out photographs are different pictures (the two motorcycle pictures are one scene: same side).
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from pipeline.errors import UserError

MODEL_NAME = "latentzoom-demo"

TRAIN = (
    "skimage/data/astronaut.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/motorcycle_right.png",
    "skimage/data/retina.jpg",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)
HELD_OUT = (
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "sklearn/datasets/images/flower.jpg",
)


def lay_out(folder: Path) -> tuple[int, int]:
    """Copy the photographs to `folder`/train and `folder`/val; returns how many. `UserError` when one is missing."""
    for split, names in (("train", TRAIN), ("val", HELD_OUT)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            source, target = _find(name), folder / split / Path(name).name
            if not target.exists() or target.stat().st_size != source.stat().st_size:
                temporary = target.with_suffix(target.suffix + ".part")
                shutil.copyfile(source, temporary)
                temporary.replace(target)
    return len(TRAIN), len(HELD_OUT)


def _find(name: str) -> Path:
    package, _, rest = name.partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / rest if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"the demo's photograph {name} is not installed; run `make setup` again")
    return path
