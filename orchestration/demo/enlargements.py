"""The demo's first act: held-out photographs enlarged by the starter, beside nearest, bicubic and the original.

Each photograph is shrunk by anti-aliased bicubic to 8 bits, then enlarged. PSNR is that of the protocol `benchmark`,
LPIPS that of the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from orchestration.demo.photos import CREDITS, DETAILS
from orchestration.demo.sheet import GREY, Tile, heading, row, stack, text
from pipeline.geometry import Size
from pipeline.images import from_uint8, to_pictures, to_tensor, to_uint8
from pipeline.metrics.psnr import psnr
from pipeline.metrics.ssim import resize_pictures
from pipeline.model import LatentZoom
from pipeline.resize import resize
from training.evaluation.networks import Networks, build_networks, with_found_lpips
from training.evaluation.spec import EvaluationSpec

SCALES = (2.0, 3.3, 5.0)
METHODS = ("nearest", "bicubic", "latentzoom")
DETAIL: Size = (200, 300)
"""Height and width of what the sheet shows of a photograph, in pixels."""
STAND_IN_SIDE = 224
"""Side of the middle on which the stand-in for LPIPS is measured: its network is twenty times as large."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How close the enlargements of one photograph come. psnr (dB, higher is better) and lpips (lower is better) by
    method."""

    photo: str
    scale: float
    psnr: dict[str, float]
    lpips: dict[str, float]

    def not_above_bicubic(self, lpips_title: str = "LPIPS") -> list[str]:
        """The figures in which ours is no better than bicubic; none, it is hoped."""
        worse = {
            "PSNR": self.psnr["latentzoom"] <= self.psnr["bicubic"],
            lpips_title: self.lpips["latentzoom"] >= self.lpips["bicubic"],
        }
        return [name for name, is_worse in worse.items() if is_worse]


@dataclass(frozen=True, kw_only=True)
class Enlargement:
    """Figures, and the same detail of each method's picture and of the original."""

    figures: Figures
    details: dict[str, Image.Image]


def lpips_networks() -> Networks:
    """LPIPS on AlexNet where the package with its weights is installed, else the stand-in with a name of its own."""
    return build_networks(with_found_lpips(EvaluationSpec(task="sr", scales=SCALES)))


@torch.no_grad()
def enlarge(model: LatentZoom, networks: Networks, photo: Path, scale: float) -> Enlargement:
    """Shrink a photograph and enlarge it again. Where the scale does not divide its size, a few border pixels go."""
    with Image.open(photo) as image:
        whole = to_uint8(to_tensor(image))
    low_size: Size = (int(whole.shape[-2] / scale), int(whole.shape[-1] / scale))
    size: Size = (round(low_size[0] * scale), round(low_size[1] * scale))
    truth = _window(whole, (0.5, 0.5), size)
    low = resize_pictures(truth, low_size)
    made = {
        "nearest": to_uint8(resize(from_uint8(low), size, mode="nearest")),
        "bicubic": resize_pictures(low, size),
        "latentzoom": to_uint8(to_tensor(model.upscale(to_pictures(from_uint8(low))[0], size=size))),
    }
    figures = Figures(
        photo=photo.name,
        scale=scale,
        psnr={name: round(float(psnr(picture, truth, "benchmark", scale)[0]), 3) for name, picture in made.items()},
        lpips={name: round(_distance(networks, picture, truth), 4) for name, picture in made.items()},
    )
    centre = DETAILS.get(photo.name, (0.5, 0.5))
    shown = made | {"original": truth}
    return Enlargement(
        figures=figures, details={name: _picture(_window(p, centre, DETAIL)) for name, p in shown.items()}
    )


def verdict(figures: Sequence[Figures], lpips_name: str) -> str:
    """Whether every enlargement of ours is above bicubic, in one line that says so plainly if one is not."""
    title = _lpips_title(lpips_name)
    worse = {f"{f.photo} x{f.scale:g}": f.not_above_bicubic(title) for f in figures}
    behind = [f"{name} in {' and '.join(names)}" for name, names in worse.items() if names]
    if behind:
        return f"NOT above bicubic: {', '.join(behind)}"
    return f"All {len(figures)} of ours are above bicubic, in PSNR and in {title}"


def protocol(lpips_name: str) -> list[str]:
    """What the figures are, in two lines."""
    distance = "LPIPS (AlexNet, v0.1)"
    if lpips_name != "lpips":
        distance = f"{lpips_name} of the middle {STAND_IN_SIDE} pixels (stands in for LPIPS)"
    return [
        "Shrunk by the factor shown (anti-aliased bicubic, 8 bits) and enlarged again. Whole photographs are measured.",
        f"PSNR of luma, ceil(scale) pixels shaved off each border: higher is better / {distance}: lower is better.",
    ]


def _lpips_title(lpips_name: str) -> str:
    return "LPIPS" if lpips_name == "lpips" else lpips_name


def table(figures: Sequence[Figures], lpips_name: str) -> str:
    """All figures as text: PSNR and LPIPS of each method, what ours gains over bicubic, and the verdict."""
    width = max(len(f.photo) for f in figures)
    head = "".join(f"{name:>17}" for name in METHODS)
    lines = [*protocol(lpips_name), "", f"{'photograph':<{width}}  scale{head}   over bicubic"]
    for f in figures:
        cells = "".join(f"{f.psnr[name]:>9.2f} / {f.lpips[name]:.3f}" for name in METHODS)
        gain = f.psnr["latentzoom"] - f.psnr["bicubic"], f.lpips["latentzoom"] - f.lpips["bicubic"]
        lines.append(f"{f.photo:<{width}}  {f'x{f.scale:g}':>5}{cells}   {gain[0]:+.2f} / {gain[1]:+.3f}")
    return "\n".join([*lines, "", verdict(figures, lpips_name) + "."])


def panel(enlargements: Sequence[Enlargement], lpips_name: str) -> Image.Image:
    """A row for each enlargement, with the same detail of every method and of the original."""
    figures = [e.figures for e in enlargements]
    title = heading(
        "1. Photographs it was never trained on, enlarged by the starter that ships",
        *protocol(lpips_name),
        verdict(figures, lpips_name),
    )
    photos = [
        [_row(e) for e in enlargements if e.figures.photo == name] for name in dict.fromkeys(f.photo for f in figures)
    ]
    return stack([title, *(stack(rows, gap=14) for rows in photos), text(f"Photographs: {CREDITS}", 15, GREY)], gap=32)


def _row(enlargement: Enlargement) -> Image.Image:
    f = enlargement.figures
    tiles = [
        Tile(
            picture=enlargement.details[name],
            left=f"{name} x{f.scale:g}",
            right=f"{f.psnr[name]:.2f} dB / {f.lpips[name]:.3f}",
            ours=name == "latentzoom",
        )
        for name in METHODS
    ]
    return row([*tiles, Tile(picture=enlargement.details["original"], left="original", right=f.photo)])


def _distance(networks: Networks, picture: Tensor, truth: Tensor) -> float:
    if networks.lpips_name != "lpips":
        size: Size = (STAND_IN_SIDE, STAND_IN_SIDE)
        picture, truth = _window(picture, (0.5, 0.5), size), _window(truth, (0.5, 0.5), size)
    return float(networks.lpips(picture, truth)[0])


def _window(pictures: Tensor, centre: tuple[float, float], size: Size) -> Tensor:
    """(B,3,H,W) → (B,3,*size) around a centre (down, across) as fractions, moved inside; at most all of it."""
    for axis, (at, side) in enumerate(zip(centre, size), start=2):
        whole = pictures.shape[axis]
        side = min(side, whole)
        start = min(max(0, int(at * whole - side / 2)), whole - side)
        pictures = pictures.narrow(axis, start, side)
    return pictures


def _picture(pictures: Tensor) -> Image.Image:
    return to_pictures(from_uint8(pictures))[0]
