"""Pictures of a report: strips (low-res | bicubic | ours | truth) and plots of figures over size or scale."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from training.evaluation.chunk import Arrays
from training.evaluation.report import Figure, Report

_TILE, _GAP, _TEXT = 192, 6, 16
_COLUMNS = ("low", "nearest", "bicubic", "lanczos", "teacher", "ours", "truth")


def strips(pictures: Arrays) -> dict[str, bytes]:
    """PNG files by name: one strip a setting, one row a sample. Small pictures show enlarged."""
    settings = list(dict.fromkeys(key.split("|")[2] for key in pictures))
    return {f"strip-{setting}.png": _strip(pictures, setting) for setting in settings}


def plots(report: Report) -> dict[str, bytes]:
    """PNG files by name: each figure of ours, and of the baselines, over size or scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = {}
    for name in dict.fromkeys(f.name for f in report.figures):
        figures = [f for f in report.figures if f.name == name]
        if len({f.setting for f in figures}) < 2:
            continue
        figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        for label, points in _lines(figures).items():
            x, own = [x for x, _ in points], [f for _, f in points]
            axes.plot(x, [f.value for f in own], marker="o", label=label)
            if all(f.low is not None for f in own):
                axes.fill_between(x, [f.low or 0.0 for f in own], [f.high or 0.0 for f in own], alpha=0.15)
        axes.set_xlabel("scale" if figures[0].setting.startswith("x") else "output size, pixels")
        axes.set_ylabel(name)
        axes.legend()
        axes.grid(alpha=0.3)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        pyplot.close(figure)
        files[f"plot-{name}.png"] = buffer.getvalue()
    return files


def _lines(figures: list[Figure]) -> dict[str, list[tuple[float, Figure]]]:
    """Label → points (place on the axis, figure), in order: a line a method; of pairs of sizes a line a first size."""
    lines: dict[str, list[tuple[float, Figure]]] = {}
    for figure in figures:
        sizes = figure.setting.split("-")
        if len(sizes) == 1:
            lines.setdefault(figure.method, []).append((position(figure.setting), figure))
        else:
            for one, two in (sizes, sizes[::-1]):
                lines.setdefault(f"against {one}", []).append((position(two), figure))
    return {label: sorted(points, key=lambda point: point[0]) for label, points in lines.items()}


def position(setting: str) -> float:
    """Where a setting lies on the axis: "x5.3" → 5.3, "128x128" → 128."""
    return float(setting[1:]) if setting.startswith("x") else float(setting.split("x")[0])


def _strip(pictures: Arrays, setting: str) -> bytes:
    methods = [m for m in _COLUMNS if any(k.startswith(f"picture|{m}|{setting}|") for k in pictures)]
    rows = sorted({int(k.rsplit("|", 1)[1]) for k in pictures if k.split("|")[2] == setting})
    width = len(methods) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_TILE + _GAP) + _TEXT + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, method in enumerate(methods):
        left = _GAP + column * (_TILE + _GAP)
        draw.text((left, 2), f"{method} {setting}" if method == "ours" else method, fill="black")
        for row, sample in enumerate(rows):
            tile = _fit(pictures[f"picture|{method}|{setting}|{sample}"])
            sheet.paste(tile, (left, _TEXT + row * (_TILE + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _fit(array: np.ndarray) -> Image.Image:
    picture = Image.fromarray(array)
    scale = _TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
