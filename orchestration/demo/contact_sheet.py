"""The demo's contact sheet: what a stranger looks at to judge whether the program works. Two acts, side by side."""

from __future__ import annotations

from PIL import Image

from orchestration.demo.sheet import beside, stack, text, with_margin

MARGIN = 56


def contact_sheet(enlarged: Image.Image, drawn: Image.Image) -> Image.Image:
    """The panels of both acts under one title."""
    both = beside([enlarged, drawn], gap=2 * MARGIN)
    return with_margin(stack([text("latentzoom", 48), both], gap=MARGIN // 2), MARGIN)
