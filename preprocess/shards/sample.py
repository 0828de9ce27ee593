"""THE sample contract: what one key of a shard holds. Writer and loader both read it here, and only here.

    000000012.json                   id, image, crop, sha256 and size of the source, box, flip, licence and author
    000000012.png|jpg|webp           target pixels
    000000012.latent.npy             stored latent (S,h,w): KL mean and log-variance, or the continuous VQ latent
    000000012.flip.latent.npy        latent of the mirrored image (encoded, never a mirrored latent)
    000000012.cond16.latent.npy      latent of the 16-pixel input enlarged (SR condition), on the image's latent grid
                                     or with one cell for each low-resolution pixel (the transform's condition_cells)
    000000012.flip.cond16.latent.npy the same for the mirrored image

Keys are plan positions, so that names sort in plan order and no source can choose a path.
Legend: B batch, H/W pixels, h/w latent grid, S stored channels. Latents are unscaled.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 1
PIXEL_FORMATS = ("png", "jpg", "webp")
_KNOWN_MEMBER = re.compile(r"json|png|jpg|webp|latent\.npy|flip\.latent\.npy|(flip\.)?cond[1-9][0-9]*\.latent\.npy")

_CONDITION = re.compile(r"(?:flip\.)?cond([1-9][0-9]*)\.latent\.npy")


@dataclass(slots=True)
class Batch:
    """What the loader yields.

    ids: sample ids, B of them. pixels: uint8 (B,3,H,W). latents, condition: float32 (B,S,h,w), stored form, unscaled.
    A part that was not asked for, or is not in the shards, is None.
    """

    ids: list[str]
    pixels: Tensor | None = None
    latents: Tensor | None = None
    condition: Tensor | None = None


@dataclass(slots=True)
class Sample:
    """One sample as the writer holds it. `latents` maps member names (without key) to arrays."""

    index: int
    info: dict[str, Any]
    pixels: bytes
    latents: dict[str, np.ndarray] = field(default_factory=dict)


def sample_id(image: str, crop: int, numbered: bool) -> str:
    """Id of crop `crop` of an image; the image's own id where every image gives exactly one sample."""
    return f"{image}#{crop:04d}" if numbered else image


def key(index: int) -> str:
    """Key of the sample at plan position `index`."""
    return f"{index:09d}"


def latent_member(flip: bool, lr_size: int = 0) -> str:
    """Name of a latent member: the image's own (lr_size 0) or an SR condition, of the image or its mirror."""
    name = f"cond{lr_size}.latent.npy" if lr_size else "latent.npy"
    return "flip." + name if flip else name


def stored_shape(member: str, latent_shape: list[int], condition_cells: str) -> tuple[int, ...]:
    """Shape of a latent member. A condition has the image's latent grid, or one cell for each low-resolution pixel."""
    condition = _CONDITION.fullmatch(member)
    if condition is None or condition_cells == "image":
        return tuple(latent_shape)
    return latent_shape[0], int(condition[1]), int(condition[1])


def member_suffixes(pixel_format: str, latents: bool, flips: bool, lr_sizes: tuple[int, ...]) -> list[str]:
    """Every member of one sample, in the order of the tar (sorted)."""
    names = ["json", pixel_format]
    if latents:
        for flip in (False, True) if flips else (False,):
            names += [latent_member(flip, lr_size) for lr_size in (0, *lr_sizes)]
    return sorted(names)


def check_suffixes(suffixes: list[str], where: str) -> None:
    """Refuse members outside the contract: nothing unknown, and so nothing pickled, is ever decoded."""
    for suffix in suffixes:
        if not _KNOWN_MEMBER.fullmatch(suffix):
            raise UserError(f"{where}: member .{suffix} is not part of the sample contract; refusing to read it")


def encode_members(sample: Sample, pixel_format: str) -> dict[str, bytes]:
    """Extension → content of every member."""
    members = {
        "json": json.dumps(sample.info, sort_keys=True, ensure_ascii=False).encode(),
        pixel_format: sample.pixels,
    }
    for name, array in sample.latents.items():
        members[name] = npy_bytes(array)
    return members


def npy_bytes(array: np.ndarray) -> bytes:
    """An array as .npy (format 1.0, C order, never pickled)."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The exact header that `npy_bytes` writes for such an array; the loader compares instead of parsing."""
    whole = npy_bytes(np.zeros(shape, dtype))
    return whole[: len(whole) - int(np.prod(shape)) * np.dtype(dtype).itemsize]
