"""Pictures of any size written to a file window by window: PNG in rows, TIFF (BigTIFF) in tiles, in bounded memory.
JPEG, WebP and AVIF are drawn so too, and written at once.

Legend: H/W pixels, c channels; windows are (y0, x0, y1, x1).
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pipeline import storage
from pipeline.beside import replacing
from pipeline.errors import UserError
from pipeline.formats import FORMATS, PNG, TIFF, format_of, suffix_of
from pipeline.png_stream import PngStream
from pipeline.sizes import Size, Window
from pipeline.whole_file import texts_of, write_whole

Pixels = NDArray[np.uint8]
Draw = Callable[[Window], Pixels]
"""Window → its pixels (y1-y0, x1-x0, c)."""

WINDOW = 1024
"""Height and width of the windows that are drawn at once."""
TIFF_TILE = 512
DEFAULT_QUALITY = 95
"""Of JPEG, WebP and AVIF."""
_BAND_BYTES = 32 << 20
"""A PNG is drawn in bands as wide as the picture, of at most this many bytes (but at least one row)."""
_DATE_TIME = 306
_TIFF_EXIF = {271: "Make", 272: "Model", _DATE_TIME: "DateTime", 315: "Artist", 33432: "Copyright"}
_TIFF_MOMENT = re.compile(r"\d{4}:\d\d:\d\d \d\d:\d\d:\d\d", re.ASCII)
"""What TIFF allows as a date. Cameras whose clock was never set write others, which are left out."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file says besides its pixels: text by keyword, colour profile, EXIF block."""

    text: Mapping[str, str] = field(default_factory=dict)
    icc: bytes | None = None
    exif: bytes | None = None


def write_canvas(
    target: Path,
    size: Size,
    draw: Draw,
    *,
    channels: int = 3,
    facts: Facts | None = None,
    quality: int = DEFAULT_QUALITY,
    on_pixels: Callable[[int], object] | None = None,
) -> None:
    """Draw a picture of `size` and write it to `target`, in the format of its suffix (`formats.FORMATS`): beside it
    first, then renamed.

    quality: of JPEG, WebP and AVIF, 1 to 100. on_pixels is called with the number of pixels of each window drawn. TIFF
    keeps the common EXIF fields only. Raises `UserError` for other suffixes, for sizes beyond a format's limits, and
    when the folder cannot be written.
    """
    form = format_of(str(target), size)
    facts = facts or Facts()
    try:
        with replacing(target) as stream:
            if form is PNG:
                write_png(stream, size, draw, channels=channels, facts=facts, on_pixels=on_pixels)
            elif form is TIFF:
                _write_tiff(stream, size, _counted(draw, on_pixels), channels, facts)
            else:
                pixels = draw_whole(size, _counted(draw, on_pixels), channels)
                write_whole(
                    stream, form, pixels, quality=quality, text=dict(facts.text), icc=facts.icc, exif=facts.exif
                )
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def draw_whole(size: Size, draw: Draw, channels: int) -> Pixels:
    """(H,W,channels), drawn window by window."""
    whole = np.empty((*size, channels), np.uint8)
    for y0, x0, y1, x1 in windows(size):
        whole[y0:y1, x0:x1] = draw((y0, x0, y1, x1))
    return whole


def read_text(target: Path | str) -> dict[str, str]:
    """The text fields of a file (path or URL) that `write_canvas` wrote; {} for any other, or none. Decodes no pixel,
    but those of AVIF."""
    import tifffile

    try:
        with storage.opened(str(target)) as stream:
            form = FORMATS.get(suffix_of(str(target)))
            if form is PNG:  # not Image.open, which refuses large pictures
                return {str(key): str(value) for key, value in PngImageFile(stream).info.items()}
            if form is TIFF:
                with tifffile.TiffFile(stream) as tiff:
                    return dict(line.split(": ", 1) for line in tiff.pages.first.description.splitlines())
            with Image.open(stream, formats=("JPEG", "WEBP", "AVIF")) as image:
                return texts_of(image.info.get("xmp", b""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, tifffile.TiffFileError):
        return {}


def write_png(
    stream: IO[bytes],
    size: Size,
    draw: Draw,
    *,
    channels: int = 3,
    facts: Facts | None = None,
    on_pixels: Callable[[int], object] | None = None,
) -> None:
    """A PNG to a stream that need not seek, such as a pipe. One band is compressed while the next one is drawn."""
    facts = facts or Facts()
    png = PngStream(stream, size, channels, text=facts.text, icc=facts.icc, exif=facts.exif)
    with ThreadPoolExecutor(1, thread_name_prefix="latentzoom-png") as writer:
        written: Future[None] | None = None
        for band in _bands(size, _counted(draw, on_pixels), channels):
            if written is not None:
                written.result()
            written = writer.submit(png.write_rows, band)
        if written is not None:
            written.result()
    png.close()


def png_bytes(picture: Image.Image) -> bytes:
    """A picture in memory (L, LA, RGB or RGBA) as a PNG, with profile and EXIF from its `info`."""
    pixels = np.atleast_3d(np.asarray(picture))
    facts = Facts(icc=picture.info.get("icc_profile"), exif=picture.info.get("exif"))
    stream = io.BytesIO()

    def draw(window: Window) -> Pixels:
        return pixels[window[0] : window[2], window[1] : window[3]]

    write_png(stream, (picture.height, picture.width), draw, channels=pixels.shape[2], facts=facts)
    return stream.getvalue()


def _bands(size: Size, draw: Draw, channels: int) -> Iterator[Pixels]:
    height, width = size
    num_rows = max(1, min(WINDOW, _BAND_BYTES // (width * channels)))
    for y0 in range(0, height, num_rows):
        y1 = min(y0 + num_rows, height)
        band = np.empty((y1 - y0, width, channels), np.uint8)
        for x0, x1 in _steps(0, width):
            band[:, x0:x1] = draw((y0, x0, y1, x1))
        yield band


def _write_tiff(stream: IO[bytes], size: Size, draw: Draw, channels: int, facts: Facts) -> None:
    import tifffile

    exif = Image.Exif()
    if facts.exif:
        exif.load(facts.exif)
    # Pillow decodes these texts as Latin-1, whatever they are in: so their bytes stay as they were.
    texts = {code: str(exif[code]).encode("latin-1", "replace") for code in _TIFF_EXIF if code in exif}
    moment = texts.pop(_DATE_TIME, b"").decode("latin-1")
    with tifffile.TiffWriter(stream, bigtiff=True) as tiff:
        tiff.write(
            _tiff_tiles(size, draw, channels),
            shape=(*size, channels) if channels > 1 else size,
            dtype=np.uint8,
            photometric="rgb" if channels > 2 else "minisblack",
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
            tile=(TIFF_TILE, TIFF_TILE),
            compression="zlib",
            maxworkers=1,
            iccprofile=facts.icc,
            description="\n".join(f"{key}: {value}" for key, value in facts.text.items()).encode() or None,
            software=facts.text.get("Software", False),
            datetime=moment if _TIFF_MOMENT.fullmatch(moment) else None,
            metadata=None,
            extratags=[(code, "s", 0, text, True) for code, text in texts.items()],
        )


def _tiff_tiles(size: Size, draw: Draw, channels: int) -> Iterator[Pixels]:
    """Whole tiles, row by row; those at the right and lower edge are filled up with zeros. Drawn a row at a time."""
    height, width = size
    for y0 in range(0, height, TIFF_TILE):
        y1 = min(y0 + TIFF_TILE, height)
        for x0, x1 in _steps(0, width):
            drawn = draw((y0, x0, y1, x1))
            for left in range(0, x1 - x0, TIFF_TILE):
                part = drawn[:, left : left + TIFF_TILE]
                tile = np.zeros((TIFF_TILE, TIFF_TILE, channels), np.uint8)
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile if channels > 1 else tile[:, :, 0]


def _counted(draw: Draw, on_pixels: Callable[[int], object] | None) -> Draw:
    if on_pixels is None:
        return draw

    def counted(window: Window) -> Pixels:
        pixels = draw(window)
        on_pixels(pixels.shape[0] * pixels.shape[1])
        return pixels

    return counted


def windows(size: Size) -> Iterator[Window]:
    """The windows of a picture, row by row: together they are the whole."""
    return ((y0, x0, y1, x1) for y0, y1 in _steps(0, size[0]) for x0, x1 in _steps(0, size[1]))


def _steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for x0 in range(start, stop, WINDOW):
        yield x0, min(x0 + WINDOW, stop)
