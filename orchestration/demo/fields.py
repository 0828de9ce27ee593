"""The demo's second act: what the model made of the one picture it was trained on.

Sizes are (height, width), in pixels unless they are called cells; a cell is one position of the latent.
"""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from orchestration.demo.photos import FIELD_COLUMNS, open_field
from orchestration.demo.sheet import GAP, Tile, beside, heading, marked, row, stack, text
from pipeline.geometry import Size, Window
from pipeline.images import to_pictures
from pipeline.model import LatentZoom

NUM_FIELDS, FIELD_SIDE = 10, 236
"""New fields of the training size, and the side at which they are drawn."""
SIZES, SIZED = (64, 128, 216, 360), 2
"""Sides at which field number SIZED is drawn again."""
WIDE_CELLS: Size = (32, 48)
LARGE_CELLS: Size = (96, 144)
SHOWN: Size = (413, 620)
"""Size at which the wide and the large field are drawn whole."""
ZOOM = 4
WINDOW: Window = (416, 600, 416 + 800, 600 + 1260)
"""What is cut from the large field drawn ZOOM times as large as `SHOWN`: (top, left, bottom, right)."""


def panel(model: LatentZoom, trained: str, seed: int = 0) -> Image.Image:
    """The picture learned from, one field at several sizes, new fields, a wide one, and a window of a large one.

    trained: a few words on how the model was trained. Field i has seed + i."""
    title = heading(
        "2. New fields of galaxies, drawn by a model trained just now on one picture",
        f"{trained}. It has learned what the frame holds; everything else below is drawn from noise.",
        "Sizes are height x width. All sizes of a field are rendered from one latent, so they show the same sky.",
    )
    wide, large = (_latent(model, seed + NUM_FIELDS + i, cells) for i, cells in enumerate((WIDE_CELLS, LARGE_CELLS)))
    return stack(
        [
            title,
            beside([row([_learned_from()]), _sizes(model, seed)], gap=GAP),
            *_fields(model, seed),
            row([_wide(model, wide), _large(model, large)]),
            row([_window(model, large)]),
        ],
        gap=14,
    )


def _learned_from() -> Tile:
    """The whole picture, with a frame around the part that is trained on."""
    field = open_field()
    width = 1260 - sum(SIZES) - GAP * len(SIZES)
    scale = width / field.width
    small = field.resize((width, round(field.height * scale)), Image.Resampling.LANCZOS)
    picture = marked(small, (0, 0, round(FIELD_COLUMNS * scale), small.height - 1))
    return Tile(picture=picture, left="learned from, in the frame", right="Hubble XDF: NASA, ESA")


def _sizes(model: LatentZoom, seed: int) -> Image.Image:
    latent = _latent(model, seed + SIZED)
    tiles = [Tile(picture=_render(model, latent, (side, side)), left=f"{side}x{side}") for side in SIZES]
    canvas = row(tiles)
    canvas.paste(text(f"One field (seed {seed + SIZED}), drawn at four sizes", 18), (0, 0))
    return canvas


def _fields(model: LatentZoom, seed: int, columns: int = 5) -> list[Image.Image]:
    pictures = model.generate(num=NUM_FIELDS, size=(FIELD_SIDE, FIELD_SIDE), seed=seed)
    name = f"{FIELD_SIDE}x{FIELD_SIDE}"
    tiles = [Tile(picture=picture, left=f"seed {seed + i}", right=name) for i, picture in enumerate(pictures)]
    return [row(tiles[start : start + columns]) for start in range(0, NUM_FIELDS, columns)]


def _wide(model: LatentZoom, latent: Tensor) -> Tile:
    return Tile(picture=_render(model, latent, SHOWN), left="a wide field", right=_cells(WIDE_CELLS))


def _large(model: LatentZoom, latent: Tensor) -> Tile:
    """The large field, with a frame around what `_window` shows of it."""
    top, left, bottom, right = (side // ZOOM for side in WINDOW)
    picture = marked(_render(model, latent, SHOWN), (left, top, right, bottom))
    return Tile(picture=picture, left="a much larger field", right=_cells(LARGE_CELLS))


def _window(model: LatentZoom, latent: Tensor) -> Tile:
    size = ZOOM * SHOWN[0], ZOOM * SHOWN[1]
    name = f"the frame of the larger field, as a window of its rendering at {size[0]}x{size[1]}"
    return Tile(picture=_render(model, latent, size, WINDOW), left=name)


def _latent(model: LatentZoom, seed: int, cells: Size | None = None) -> Tensor:
    return model.sample_latents(num=1, seed=seed, latent_size=cells, sampler="dpm++", num_steps=20)


def _render(model: LatentZoom, latent: Tensor, size: Size, window: Window | None = None) -> Image.Image:
    return to_pictures(model.decode(latent, size, window))[0]


def _cells(size: Size) -> str:
    return f"latent of {size[0]}x{size[1]} cells, drawn at {SHOWN[0]}x{SHOWN[1]}"
