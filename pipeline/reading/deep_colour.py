"""Colour pictures of 16 bits a channel → 8 bits, rounded instead of cut.

Pillow keeps of each 16-bit value only the high byte. Told that the bytes of a value come in the other order, it keeps
the low byte of the same file, and both together are the exact value.

Legend: H/W pixels, C channels.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
from PIL import Image

_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_LAYOUTS = {f"{name};16{order}": f"{name};16{_SWAPPED[order]}" for name in ("RGB", "RGBA", "RGBX") for order in "BLN"}
_LAYOUTS["LA;16B"] = "RGBA"  # the four bytes of a pixel as if they were four channels
_TO_8_BITS = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)


def load_rounded(image: Image.Image, data: bytes, formats: tuple[str, ...]) -> None:
    """Load the first frame of `image`, opened from `data`; 16-bit colour becomes v · 255 / 65535, rounded.

    That is: RGB and RGBA of PNG and TIFF, and PNG's grey with alpha. Other 16-bit colour (CMYK, alpha multiplied in,
    channels in separate planes, animations) stays as Pillow reads it, cut to its high bytes. Raises what Pillow raises.
    """
    layouts = {_layout(tile) for tile in getattr(image, "tile", [])}
    animated = image.format == "PNG" and getattr(image, "is_animated", False)
    swapped = _LAYOUTS.get(layouts.pop()) if len(layouts) == 1 and not animated else None
    if swapped is None:
        image.load()
        return
    other: Any = Image.open(io.BytesIO(data), formats=formats)
    other.tile = [tile._replace(args=_with_layout(tile.args, swapped)) for tile in other.tile]
    image.load()
    low = np.asarray(other)
    if swapped == "RGBA":
        low = low[..., (1, 1, 1, 3)]
    values = (np.asarray(image).astype(np.uint16) << 8) | low  # (H,W,C)
    image.paste(Image.fromarray(_TO_8_BITS[values]))
    clear = image.info.pop("transparency", None)  # the one colour, in 16 bits, that a PNG without alpha shows through
    if clear is not None:
        seen = (values[..., :3] != np.asarray(clear, np.uint16)).any(-1)
        image.putalpha(Image.fromarray(seen.astype(np.uint8) * 255))


def is_deep_grey(image: Image.Image) -> bool:
    """Whether an image that is opened and not loaded is a PNG's 16-bit grey with alpha, which Pillow makes colours."""
    return any(_layout(tile) == "LA;16B" for tile in getattr(image, "tile", []))


def _layout(tile: Any) -> str:
    """Pillow's name for the order of channels and bytes in the file."""
    return str(tile.args if isinstance(tile.args, str) else tile.args[0])


def _with_layout(args: Any, layout: str) -> Any:
    return layout if isinstance(args, str) else (layout, *args[1:])
