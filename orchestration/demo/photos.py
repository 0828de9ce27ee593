"""The demo's pictures come inside scikit-image and scikit-learn: photographs to enlarge, and one field of galaxies.

The photographs were held out when the starter was trained. The field is split by place: columns that are trained on,
and a strip on its right that is held out. No pixel is in both.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from orchestration.starter.photographs import HELD_OUT
from pipeline.errors import UserError

MODEL_NAME = "latentzoom-demo"
DETAILS = {"chelsea.png": (0.42, 0.5), "coffee.png": (0.46, 0.5), "flower.jpg": (0.5, 0.5)}
"""Centre (down, across) of what the sheet shows of a photograph, as fractions of its height and width."""
FIELD = "skimage/data/hubble_deep_field.jpg"
"""The Hubble eXtreme Deep Field (NASA, ESA; public domain), 872 x 1000 pixels (height x width)."""
FIELD_COLUMNS = 800
"""Columns of the field, from the left, that are trained on. The strip right of them is held out."""
CREDITS = ", ".join(f"{photo.name} {photo.author} ({photo.licence})" for photo in HELD_OUT)
TURNS = (0, 90, 180, 270)
"""Degrees by which the part that is trained on is turned: the sky has no up."""


def lay_out_photographs(folder: Path) -> list[Path]:
    """Copies of the held-out photographs in `folder`, in order. `UserError` when one is missing."""
    return [_write(folder / photo.name, _copier(find(photo.place))) for photo in HELD_OUT]


def lay_out_field(folder: Path) -> tuple[int, int]:
    """The field as `folder`/train (what is trained on, in four orientations) and `folder`/val (the held-out strip);
    returns their numbers of columns. `UserError` when the picture is missing."""
    field = open_field()
    left = field.crop((0, 0, FIELD_COLUMNS, field.height))
    strip = field.crop((FIELD_COLUMNS, 0, field.width, field.height))
    for degrees in TURNS:
        _write(folder / "train" / f"turned-{degrees}.png", _saver(left.rotate(degrees, expand=True)))
    _write(folder / "val" / "strip.png", _saver(strip))
    return left.width, strip.width


def open_field() -> Image.Image:
    """The whole field. `UserError` when the picture is missing."""
    with Image.open(find(FIELD)) as image:
        return image.convert("RGB")


def find(place: str) -> Path:
    """The file PACKAGE/... of an installed package; nothing is imported. `UserError` when it is missing."""
    package, _, rest = place.partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / rest if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"the demo's picture {place} is not installed; run `make setup` again")
    return path


def _copier(source: Path) -> Callable[[Path], object]:
    return lambda target: shutil.copyfile(source, target)


def _saver(picture: Image.Image) -> Callable[[Path], object]:
    return lambda target: picture.save(target, "PNG")


def _write(target: Path, write: Callable[[Path], object]) -> Path:
    """Write beside `target` and rename: nothing half-written is ever seen."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(target.suffix + ".part")
    write(temporary)
    temporary.replace(target)
    return target
