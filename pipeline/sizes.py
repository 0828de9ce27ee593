"""Sizes and windows in pixels, checked. Imports nothing, so that arguments are judged before any library is there."""

from __future__ import annotations

from pipeline.errors import UserError

MAX_SIDE = 1 << 20
"""Largest height or width of an output grid, in pixels."""

Size = tuple[int, int]
"""(H, W)."""
Window = tuple[int, int, int, int]
"""(y0, x0, y1, x1)."""


def check_size(size: Size) -> Size:
    """(H, W) as two ints; raises `UserError` when a side is not an integer in 1..MAX_SIDE."""
    sides = _whole_numbers(size)
    if len(sides) != 2 or not all(1 <= side <= MAX_SIDE for side in sides):
        raise UserError(f"size {size!r} is not allowed; height and width must be whole numbers from 1 to {MAX_SIDE}")
    return sides[0], sides[1]


def check_window(window: Window | None, size: Size) -> Window:
    """(y0, x0, y1, x1) inside `size`; None is the whole output. Raises `UserError` when it lies outside or is empty."""
    if window is None:
        return 0, 0, size[0], size[1]
    edges = _whole_numbers(window)
    if len(edges) != 4 or not (0 <= edges[0] < edges[2] <= size[0] and 0 <= edges[1] < edges[3] <= size[1]):
        raise UserError(f"window {window!r} is not inside the output of {size[0]}x{size[1]}; use (y0, x0, y1, x1)")
    return edges[0], edges[1], edges[2], edges[3]


def parse_size(text: str) -> Size:
    """ "700x1000" → (700, 1000), "256" → (256, 256): height before width. Raises `UserError`."""
    parts = text.lower().replace("×", "x").split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UserError(f"size {text!r} is not allowed; use height x width, such as 700x1000")
    return check_size((numbers[0], numbers[-1]))


def _whole_numbers(values: object) -> list[int]:
    """The entries as ints; nothing when any of them is not a whole number."""
    try:
        entries = [float(value) for value in values if not isinstance(value, (bool, str))]  # type: ignore[attr-defined]
        complete = len(entries) == len(values)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return []
    return [int(entry) for entry in entries] if complete and all(entry.is_integer() for entry in entries) else []
