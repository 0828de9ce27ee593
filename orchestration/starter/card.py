"""The starter's model card: what it is, what it was trained on and how, what was tried, and its figures.

`figures.json` holds what was measured: figures of the shipped weights by `latentzoom evaluate`, and the trials.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from orchestration.starter.photographs import HELD_OUT, TRAIN, WEIGHTS_LICENCE, Photograph
from pipeline import storage
from pipeline.bundle import Bundle
from pipeline.starter import Look

_WHAT = {
    "faithful": "closest to the truth pixel by pixel",
    "sharp": "crisper for the eye, at the cost of some decibels",
}
_USE = {
    "faithful": "`latentzoom upscale` and `LatentZoom.starter()` use it when no other model is given.",
    "sharp": '`latentzoom upscale --look sharp` and `LatentZoom.starter("sharp")` use it.',
}


def starter_card(look: Look, bundle: Bundle, result: Mapping[str, Any], weights: str) -> str:
    """The card of one look, Markdown. weights: SHA-256 of its decoder's file; the figures that were measured are those
    of certain weights, and others have none."""
    decoder = bundle.config.decoder
    assert bundle.decoder is not None
    num = sum(p.numel() for p in bundle.decoder.parameters())
    settings = bundle.meta["stages"]["decoder"]["settings"]
    lines = [
        f"# {bundle.config.name}",
        "",
        f"A small model for super-resolution by any factor, {_WHAT[look]}. It comes with latentzoom:",
        _USE[look],
        "",
        "## What it is",
        "",
        f"Direct super-resolution without a denoiser: {num:,} parameters. The latent is the low-resolution picture",
        f"itself; D_phi has {decoder.num_res_blocks + 3} residual blocks of width {decoder.base_width} without",
        "normalisation, so tiles of a large picture agree exactly with the whole; the implicit head is the `light` one",
        f"({decoder.light_width} × {decoder.light_depth}).",
        "",
        "## Training",
        "",
        "One command makes it again: `make starter` (about three hours on two CPU cores with bf16",
        "instructions, longer without; it can be stopped and continues).",
        "",
        f"- {result['steps']:,} steps of {settings['global_batch']} samples in {result['seconds'] / 3600:.2f} hours"
        f"{' (after the faithful look)' if look == 'sharp' else ''}, Adam, learning rate {settings['lr']:g} (cosine), "
        f"averaged weights {settings['ema_decay']}, {settings['precision']}, seed {settings['seed']}",
        f"- loss: {settings['loss']}"
        + (f" + {settings['perceptual_weight']} × LPIPS (VGG16)" if settings["perceptual_weight"] else ""),
        f"- scales {settings['min_scale']:g} to {settings['max_scale']:g}, log-uniform, drawn anew for every step; "
        f"inputs of {settings['input_cells']}² pixels reduced by anti-aliased bicubic, 8 bits; flips and turns",
        f"- tiles of {bundle.config.image_size} pixels from the photographs below, reduced as the table says",
        "",
        *_figures(look, weights),
        "## Photographs",
        "",
        "Trained on:",
        "",
        *_table(TRAIN),
        "",
        "Held out, looked at during training and never trained on:",
        "",
        *_table(HELD_OUT),
        "",
        "## Licence",
        "",
        f"The weights are published under {WEIGHTS_LICENCE}, the strictest licence of the photographs. The code is",
        "Apache-2.0.",
    ]
    return "\n".join(lines) + "\n"


def _table(photographs: tuple[Photograph, ...]) -> list[str]:
    rows = ["| photograph | package | author | licence | reduced by |", "|---|---|---|---|---|"]
    for photo in photographs:
        package = photo.place.removeprefix("debian:").split("/")[0]
        factors = ", ".join(f"{factor:g}" for factor in photo.reduce)
        rows.append(f"| {photo.name} | {package} | {photo.author} | {photo.licence} | {factors} |")
    return rows


def _figures(look: str, weights: str) -> list[str]:
    known = storage.read_json(str(resources.files("orchestration.starter") / "figures.json"))
    lines: list[str] = []
    figures = known["figures"].get(look) if known["weights"].get(look) == weights else None
    if figures:
        lines += ["## Figures", "", known["protocol"], "", *_rows(figures), ""]
    if look == "faithful" and known["trials"]:
        lines += ["## Trials", "", known["trials_about"], "", *_rows(known["trials"]), ""]
    return lines


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    table = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return table + [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows]
