"""The demo's contact sheet: what a stranger looks at to judge whether the program works."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.images import to_tensor, to_uint8
from pipeline.metrics.psnr import psnr
from pipeline.model import LatentZoom

SIZES = ((64, 64), (128, 128), (96, 176), (224, 224))
SCALES = (2.0, 3.3, 5.0)
_SIDE = 224
_PAD = 10
_INK, _GREY = (20, 20, 20), (110, 110, 110)


def draw(model: LatentZoom, held_out: list[Path], title: str, num: int = 5, seed: int = 0) -> Image.Image:
    """Top: `num` samples (seed, seed + 1, ...) each at four sizes. Below: each held-out photograph, shrunk and enlarged
    again by three factors, beside nearest, bicubic and the original, with its PSNR."""
    parts = [_heading(title)]
    parts += [
        _caption("Generated: one latent a column, rendered at four sizes (height x width), one of them not square")
    ]
    parts.append(_generated(model, num, seed))
    parts += [
        _caption("Held-out photographs, shrunk by the factor shown and enlarged again. PSNR in dB against the original")
    ]
    parts += [_upscaled(model, path) for path in held_out]
    return _stack(parts)


def _generated(model: LatentZoom, num: int, seed: int) -> Image.Image:
    rows = []
    for size in SIZES:
        pictures = model.generate(num=num, size=size, seed=seed)
        rows.append(
            _row([(p, f"seed {seed + i}, {size[0]}x{size[1]}") for i, p in enumerate(pictures)], width=_SIDE + _PAD)
        )
    return _stack(rows)


def _upscaled(model: LatentZoom, path: Path) -> Image.Image:
    original = _centre(Image.open(path).convert("RGB"))
    rows = []
    for scale in SCALES:
        low_side = round(_SIDE / scale)
        low = original.resize((low_side, low_side), Image.Resampling.BICUBIC)
        ours = model.upscale(low, size=(_SIDE, _SIDE))
        enlarged = {
            "nearest": low.resize((_SIDE, _SIDE), Image.Resampling.NEAREST),
            "bicubic": low.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC),
            "latentzoom": ours,
        }
        tiles = [(low, f"input {low_side}x{low_side}")]
        tiles += [(picture, f"{name} x{scale:g}: {_psnr(picture, original):.2f}") for name, picture in enlarged.items()]
        tiles.append((original, f"original {path.name}"))
        rows.append(_row(tiles, width=_SIDE + _PAD))
    return _stack(rows)


def _centre(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)


def _psnr(picture: Image.Image, original: Image.Image) -> float:
    return float(psnr(to_uint8(to_tensor(picture)), to_uint8(to_tensor(original)))[0])


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _heading(text: str) -> Image.Image:
    return _text(text, 22, _INK, 40)


def _caption(text: str) -> Image.Image:
    return _text(text, 15, _INK, 30)


def _text(text: str, size: int, ink: tuple[int, int, int], height: int) -> Image.Image:
    font = _font(size)
    canvas = Image.new("RGB", (int(font.getlength(text)) + 2 * _PAD, height), "white")
    ImageDraw.Draw(canvas).text((_PAD, _PAD), text, fill=ink, font=font)
    return canvas


def _row(tiles: list[tuple[Image.Image, str]], width: int) -> Image.Image:
    height = max(picture.height for picture, _ in tiles) + 28
    canvas = Image.new("RGB", (width * len(tiles) + _PAD, height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (picture, text) in enumerate(tiles):
        canvas.paste(picture, (_PAD + i * width, 2))
        pen.text((_PAD + i * width, picture.height + 5), text, fill=_GREY, font=_font(13))
    return canvas


def _stack(parts: list[Image.Image]) -> Image.Image:
    canvas = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    y = 0
    for part in parts:
        canvas.paste(part, (0, y))
        y += part.height
    return canvas
