"""How the contact sheet is set: tiles with a caption below, in rows, in columns. Everything is plain Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Ink = tuple[int, int, int]
PAPER: Ink = (255, 255, 255)
INK: Ink = (24, 24, 27)
GREY: Ink = (113, 113, 122)
ACCENT: Ink = (29, 78, 216)
MARK: Ink = (250, 204, 21)
GAP = 20
"""Pixels between tiles: four of 300, five of 236 and two of 620 pixels are all 1260 wide."""
_CAPTION, _CAPTION_SIZE = 30, 15


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A picture with a caption: `left` at its left edge, `right` at its right one. ours: in the accent colour."""

    picture: Image.Image
    left: str = ""
    right: str = ""
    ours: bool = False


def row(tiles: Sequence[Tile]) -> Image.Image:
    """Tiles side by side, their pictures on one lower edge, each with its caption below."""
    top = max(tile.picture.height for tile in tiles)
    canvas = _paper(sum(tile.picture.width for tile in tiles) + GAP * (len(tiles) - 1), top + _CAPTION)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_CAPTION_SIZE)
    x = 0
    for tile in tiles:
        width, height = tile.picture.size
        canvas.paste(tile.picture, (x, top - height))
        pen.text((x, top + 6), tile.left, fill=ACCENT if tile.ours else INK, font=font)
        pen.text((x + width, top + 6), tile.right, fill=ACCENT if tile.ours else GREY, font=font, anchor="ra")
        x += width + GAP
    return canvas


def text(words: str, size: int, ink: Ink = INK) -> Image.Image:
    """One line."""
    font = ImageFont.load_default(size)
    canvas = _paper(int(font.getlength(words)) + 1, round(size * 1.5))
    ImageDraw.Draw(canvas).text((0, 0), words, fill=ink, font=font)
    return canvas


def heading(title: str, *lines: str) -> Image.Image:
    """A title with grey lines of explanation below."""
    return stack([text(title, 26), *(text(line, 16, GREY) for line in lines)], gap=4)


def stack(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """One below the other, on one left edge."""
    canvas = _paper(max(p.width for p in parts), sum(p.height for p in parts) + gap * (len(parts) - 1))
    y = 0
    for part in parts:
        canvas.paste(part, (0, y))
        y += part.height + gap
    return canvas


def beside(parts: Sequence[Image.Image], gap: int) -> Image.Image:
    """Side by side, on one upper edge."""
    canvas = _paper(sum(p.width for p in parts) + gap * (len(parts) - 1), max(p.height for p in parts))
    x = 0
    for part in parts:
        canvas.paste(part, (x, 0))
        x += part.width + gap
    return canvas


def with_margin(part: Image.Image, margin: int) -> Image.Image:
    canvas = _paper(part.width + 2 * margin, part.height + 2 * margin)
    canvas.paste(part, (margin, margin))
    return canvas


def marked(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The picture with a frame around box (left, top, right, bottom)."""
    copy = picture.copy()
    ImageDraw.Draw(copy).rectangle(box, outline=MARK, width=2)
    return copy


def _paper(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)
