"""JPEG, WebP and AVIF: pictures that are held whole in memory and written by Pillow, with profile, EXIF and texts.

The texts (which model, which seed) lie in an XMP packet. JPEG has no transparency: what shows is then laid over white.
"""

from __future__ import annotations

import re
from typing import IO, Any
from xml.sax.saxutils import escape, unescape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.formats import AVIF, JPEG, Format
from pipeline.reading.picture import over_white

_MAX_JPEG_EXIF = 65533 - 6
_MAX_JPEG_XMP = 65533 - 29
_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
    'xmlns:latentzoom="urn:latentzoom:1.0:"{}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_FIELD = re.compile(r'\s(xmp:CreatorTool|latentzoom:[\w.-]+)="([^"]*)"')
_QUOTES = {"&quot;": '"'}


def write_whole(
    stream: IO[bytes],
    form: Format,
    pixels: NDArray[np.uint8],
    *,
    quality: int,
    text: dict[str, str],
    icc: bytes | None,
    exif: bytes | None,
) -> None:
    """pixels (H,W,1 to 4): grey or RGB, then alpha. quality: 1 to 100; 100 is lossless in WebP."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    options: dict[str, Any] = {"quality": quality, "xmp": packet_of(text).encode()}
    if icc:
        options["icc_profile"] = icc
    if exif:
        options["exif"] = b"Exif\0\0" + exif.removeprefix(b"Exif\0\0")
    if form is JPEG:
        if image.mode in ("LA", "RGBA"):
            image = over_white(image.convert(image.mode.removesuffix("A")), image.getchannel("A"))
        options["subsampling"] = 0 if quality >= 90 else 2
        if exif and len(exif) > _MAX_JPEG_EXIF:
            del options["exif"]
        if len(options["xmp"]) > _MAX_JPEG_XMP:
            del options["xmp"]
    elif form is AVIF:
        options["subsampling"] = "4:4:4" if quality >= 90 else "4:2:0"
    else:
        options |= {"lossless": quality == 100, "exact": True, "method": 4}
    if image.mode in ("L", "LA") and form is not JPEG:  # neither has a grey of its own; read again they are grey
        image = image.convert("RGBA" if image.mode == "LA" else "RGB")
    image.save(stream, "JPEG" if form is JPEG else form.name.upper(), **options)


def packet_of(text: dict[str, str]) -> str:
    """Texts as an XMP packet: `Software`, and keywords of the form latentzoom:NAME."""
    fields = {"xmp:CreatorTool" if key == "Software" else key: value for key, value in text.items()}
    return _PACKET.format("".join(f" {escape(key)}={_quoted(value)}" for key, value in fields.items()))


def _quoted(value: str) -> str:
    return '"' + escape(value, {'"': "&quot;"}) + '"'


def texts_of(packet: bytes) -> dict[str, str]:
    """The texts of such a packet; {} for any other."""
    found = _FIELD.findall(packet.decode("utf-8", "replace"))
    return {"Software" if key == "xmp:CreatorTool" else key: unescape(value, _QUOTES) for key, value in found}
