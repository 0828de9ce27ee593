"""The starter's photographs: which, whose, under which licence, from which package, and how they are laid out.

Only public-domain, CC0, CC-BY and CC-BY-SA photographs, so the weights are published under CC-BY-SA-4.0, the strictest
of them. Drawings and rendered wallpapers of the same packages are left out: they teach little.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.errors import UserError, first_line

WEIGHTS_LICENCE = "CC-BY-SA-4.0"
_UBUNTU = "debian:lomiri-wallpapers-16.04/usr/share/backgrounds/"
_SK = "skimage/data/"


@dataclass(frozen=True)
class Photograph:
    """place: a file of an installed Python package, or "debian:PACKAGE/path in it". reduce: the factors by which it is
    made smaller before it is cut into tiles. Large JPEGs are at least halved, small ones reduced by 1.5: their
    compression goes with it."""

    place: str
    author: str
    licence: str
    reduce: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.place.rsplit("/", 1)[-1]


TRAIN = (
    Photograph(_SK + "astronaut.png", "NASA", "public domain", (1, 2)),
    Photograph(_SK + "brick.png", "CC0Textures", "CC0-1.0", (1, 2)),
    Photograph(_SK + "camera.png", "Lav Varshney", "CC0-1.0", (1, 2)),
    Photograph(_SK + "coins.png", "Brooklyn Museum", "no known copyright restrictions", (1,)),
    Photograph(_SK + "grass.png", "Linolafett", "CC0-1.0", (1, 2)),
    Photograph(_SK + "gravel.png", "CC0Textures", "CC0-1.0", (1, 2)),
    Photograph(_SK + "hubble_deep_field.jpg", "NASA, ESA", "public domain", (2,)),
    Photograph(_SK + "retina.jpg", "Mikael Häggström", "CC0-1.0", (2, 4)),
    Photograph(_SK + "rocket.jpg", "SpaceX", "CC0-1.0", (1.5,)),
    Photograph("sklearn/datasets/images/china.jpg", "Daniel Buechele", "CC-BY-2.0", (1.5,)),
    Photograph("matplotlib/mpl-data/sample_data/grace_hopper.jpg", "US Navy, James S. Davis", "public domain", (2,)),
    Photograph(_UBUNTU + "aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0", (2, 4)),
    Photograph(_UBUNTU + "analogpattern_by_Peter_Nerlich.jpg", "Peter Nerlich", "CC-BY-SA-4.0", (3,)),
    Photograph(_UBUNTU + "Bridge_by_Sander_Klootwijk.jpg", "Sander Klootwijk", "CC-BY-SA-4.0", (3, 6)),
    Photograph(_UBUNTU + "Dragonfly_by_Bolly.jpg", "Bolly", "CC-BY-SA-4.0", (2, 3, 6)),
    Photograph(_UBUNTU + "free_by_Peter_Nerlich.jpg", "Peter Nerlich", "CC-BY-SA-4.0", (3, 6)),
    Photograph(_UBUNTU + "friends_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0", (2, 4)),
    Photograph(_UBUNTU + "greentock_by_Peter_Nerlich.jpg", "Peter Nerlich", "CC-BY-SA-4.0", (3, 6)),
    Photograph(_UBUNTU + "life_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0", (2, 4)),
    Photograph(_UBUNTU + "picosdeeuropa_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0", (2, 3, 6)),
    Photograph(_UBUNTU + "Picture_0B_by_freespace.jpg", 'Trevor "Freespace"', "CC-BY-4.0", (2, 4)),
    Photograph(_UBUNTU + "Picture_1A_by_freespace.jpg", 'Trevor "Freespace"', "CC-BY-4.0", (2,)),
    Photograph(_UBUNTU + "seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt", "CC0-1.0", (3, 6)),
    Photograph(_UBUNTU + "sunset_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", "CC-BY-4.0", (2, 4)),
    Photograph(_UBUNTU + "Wine_by_Jakkub_Mede.jpg", "Jakub Mede", "CC-BY-4.0", (3, 6)),
    Photograph(
        "debian:lomiri-wallpapers-20.04/usr/share/backgrounds/Kleiber_by_Lukas_Baubkus.jpg",
        "Lukas Baubkus",
        "CC-BY-SA-3.0",
        (3, 6),
    ),
)
"""What the starter is trained on."""
HELD_OUT = (
    Photograph(_SK + "chelsea.png", "Stefan van der Walt", "CC0-1.0", (1,)),
    Photograph(_SK + "coffee.png", "Rachel Michetti", "CC0-1.0", (1,)),
    Photograph("sklearn/datasets/images/flower.jpg", "vultilion", "CC-BY-2.0", (1.5,)),
)
"""What it is looked at with while it is trained, and what the demo enlarges: never trained on."""


def lay_out(folder: Path, packages: Path | None = None) -> tuple[int, int]:
    """Write the reduced photographs to `folder`/train and `folder`/val as PNG; returns how many of each.

    packages: a folder with the Debian packages unpacked side by side (PACKAGE/usr/...); without it they are fetched
    with apt-get. Files that are there already are kept. Raises `UserError` for photographs that cannot be had.
    """
    counts = []
    with tempfile.TemporaryDirectory(prefix="latentzoom-") as scratch:
        unpacked = packages or Path(scratch)
        for split, photographs in (("train", TRAIN), ("val", HELD_OUT)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            counts.append(sum(_reduce(photo, folder / split, unpacked, packages is None) for photo in photographs))
    return counts[0], counts[1]


def _reduce(photo: Photograph, folder: Path, packages: Path, may_fetch: bool) -> int:
    for factor in photo.reduce:
        target = folder / f"{Path(photo.name).stem}-{factor:g}.png"
        if target.exists():
            continue
        path = _find(photo, packages, may_fetch)
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damage
            raise UserError(f"the photograph {path} cannot be read: {first_line(error)}") from error
        size = round(picture.width / factor), round(picture.height / factor)
        temporary = target.with_suffix(".part")
        picture.resize(size, Image.Resampling.LANCZOS).save(temporary, "PNG")
        temporary.replace(target)
    return len(photo.reduce)


def _find(photo: Photograph, packages: Path, may_fetch: bool) -> Path:
    if photo.place.startswith("debian:"):
        package, _, rest = photo.place.removeprefix("debian:").partition("/")
        if may_fetch and not (packages / package).is_dir():
            _fetch(package, packages)
        path: Path | None = packages / package / rest
    else:
        package, _, rest = photo.place.partition("/")
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / rest if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(f"the photograph {rest} of package {package} is not there; install it, or give --packages")
    return path


def _fetch(package: str, packages: Path) -> None:
    """Download a Debian package and unpack its files, without installing it."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise UserError(
            f"{package} is a Debian package and this machine has no apt-get; unpack it elsewhere "
            f"(dpkg-deb -x {package}_*.deb FOLDER/{package}) and give --packages FOLDER"
        )
    with tempfile.TemporaryDirectory(prefix="latentzoom-") as folder:
        done = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob("*.deb"))
        if done.returncode or not files:
            lines = done.stderr.strip().splitlines()
            raise UserError(f"apt-get download {package}: {lines[-1] if lines else 'failed'}; try apt-get update first")
        unpacked = subprocess.run(
            ["dpkg-deb", "-x", str(files[0]), str(packages / package)], capture_output=True, text=True
        )
        if unpacked.returncode:
            raise UserError(f"dpkg-deb -x {files[0].name}: {unpacked.stderr.strip() or 'failed'}")
