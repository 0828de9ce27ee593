"""The table of sources. A new one is a file beside this and a line here."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import UserError
from pipeline.storage import reaching
from preprocess.config import PreprocessConfig
from preprocess.retry import PATIENT, with_retries
from preprocess.sources.base import Source
from preprocess.sources.faces import open_celebahq, open_ffhq
from preprocess.sources.folder import open_folder
from preprocess.sources.lsun import open_lsun
from preprocess.sources.restoration import open_df2k, open_div2k, open_flickr2k
from preprocess.sources.shards import open_shards
from preprocess.sources.webdataset import open_webdataset

SOURCES: dict[str, tuple[Callable[[PreprocessConfig], Source], str]] = {
    "folder": (open_folder, "any images in a folder (recursively) or a zip file"),
    "ffhq": (open_ffhq, "FFHQ: folder or zip; --split official or ldm"),
    "celebahq": (open_celebahq, "CelebA-HQ: folder or zip; --split ldm"),
    "lsun": (open_lsun, "LSUN: an LMDB database or an exported folder; --split train or val"),
    "div2k": (open_div2k, "DIV2K: folder or zip, crops at full resolution"),
    "flickr2k": (open_flickr2k, "Flickr2K: folder or zip, crops at full resolution"),
    "df2k": (open_df2k, "DIV2K and Flickr2K in one folder, crops at full resolution"),
    "webdataset": (open_webdataset, "images in existing tar files: a folder of them, or shards-{000000..000099}.tar"),
    "shards": (open_shards, "the samples of a finished set, to be encoded anew (see reencode)"),
}


def open_source(config: PreprocessConfig) -> Source:
    """The source that `config` names. What it looks up meanwhile is tried again when its store fails for a passing
    reason."""
    if config.source not in SOURCES:
        raise UserError(f"unknown source {config.source!r}; known: {', '.join(SOURCES)}")
    opening = SOURCES[config.source][0]

    def open_it() -> Source:
        with reaching(config.source_url):
            return opening(config)

    return with_retries(open_it, f"opening {config.source_url}", config.retries, PATIENT.counter)
