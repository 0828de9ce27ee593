"""What may be decoded: format (from the content, never the file name) and size, before any pixel is."""

from __future__ import annotations

import io
import re
import struct
import zlib

from PIL import Image, UnidentifiedImageError

from pipeline.errors import first_line
from pipeline.reading import png

# Formats that need no outside program and that no script can hide in (EPS would start Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"P5", b"P6")
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
)
"""What decoders raise for bytes that nobody expected."""
_JPEG_2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Unreadable(Exception):
    """A picture that cannot be read. reason: empty, not_an_image (unknown content), damaged (known content), too_large
    or unsupported."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def use_own_size_limit() -> None:
    """Switch Pillow's size guess off in this process: `open_header` applies the limit that the user chose."""
    Image.MAX_IMAGE_PIXELS = None


def open_header(data: bytes, max_pixels: int) -> tuple[Image.Image, bytes]:
    """An undecoded image whose format and size are allowed, and the bytes that Pillow reads. Raises `Unreadable`."""
    if not data:
        raise Unreadable("empty", "0 bytes")
    formats: tuple[str, ...] = FORMATS
    if data[4:8] == b"ftyp" and any(brand in data[8:48] for brand in _HEIF_BRANDS):
        formats = (*FORMATS, _heif())
    elif data.startswith(_JPEG_2000):
        formats = ("JPEG2000",)
    elif _is_targa(data):
        formats = ("TGA",)
    pixels, notes = png.pixels_only(data) if data.startswith(png.SIGNATURE) else (data, png.Notes())
    try:
        image = Image.open(io.BytesIO(pixels), formats=formats)
    except Image.DecompressionBombError as error:
        raise Unreadable("too_large", detail(error)) from error
    except DECODE_ERRORS as error:
        is_known = data.startswith((*_MAGIC, *_JPEG_2000)) or data[4:12] in (b"ftypavif", b"ftypavis")
        if is_known:
            raise Unreadable("damaged", detail(error)) from error
        from pipeline.importing.content import impostor

        is_svg = b"<svg" in data[:1024].lower()
        words = "an SVG drawing, made of shapes; export it as PNG" if is_svg else impostor(data[:1024])
        raise Unreadable("not_an_image", words or detail(error)) from error
    if image.format == "PNG":
        png.describe(image, data, notes)
    check_pixels(image.height, image.width, max_pixels)
    if image.format == "JPEG2000" and image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise Unreadable("unsupported", f"JPEG 2000 of mode {image.mode}")  # of 16-bit tiles Pillow makes noise
    return image, pixels


def _is_targa(data: bytes) -> bool:
    """Whether a file without any magic number is a Targa picture: its header fits together, and its length too."""
    if len(data) < 18 or data.startswith(_MAGIC):
        return False
    length_of_id, has_palette, kind, _, colours, colour_bits, _, _, width, height, bits, flags = struct.unpack_from(
        "<BBBHHBHHHHBB", data
    )
    depths = {1: (8,), 2: (24, 32), 3: (8, 16), 9: (8,), 10: (24, 32), 11: (8,)}
    if bits not in depths.get(kind, ()) or flags & 0xC0 or not width or not height:
        return False
    is_mapped = kind in (1, 9)
    if has_palette != is_mapped or (is_mapped and (colour_bits not in (24, 32) or not 0 < colours <= 256)):
        return False
    start = 18 + length_of_id + (colours * colour_bits // 8 if is_mapped else 0)
    return len(data) > start if kind > 8 else len(data) >= start + width * height * bits // 8


def _heif() -> str:
    """The name of the format that an optional package adds to Pillow. Raises `Unreadable` where it is not installed."""
    try:
        import pillow_heif  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise Unreadable("unsupported", "HEIC needs the package pillow-heif: pip install latentzoom[heic]") from error
    pillow_heif.register_heif_opener()
    return "HEIF"


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Unreadable("too_large", f"{height}x{width} has more than {max_pixels} pixels")
    if min(width, height) < 1:
        raise Unreadable("damaged", f"{height}x{width} pixels")


def detail(error: BaseException) -> str:
    """An error in words that are the same in every process: details enter receipts, ledger and manifest."""
    if isinstance(error, UnidentifiedImageError):
        return "content is of no known image format"
    return _ADDRESS.sub("", first_line(error))
