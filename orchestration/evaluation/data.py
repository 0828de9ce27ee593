"""The pictures a model is evaluated on: a shard set's split, or a folder of pictures, read by position."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import UserError
from pipeline.formats import is_picture_name
from pipeline.images import to_tensor, to_uint8
from pipeline.reading import read_picture
from preprocess.loader import ShardLoader
from preprocess.manifest import MANIFEST_NAME, load_manifest

_MAX_PIXELS = 1 << 28


class Pictures(Protocol):
    """digest: names the exact content. num: pictures there are. split: "" where the data has none. kind: the source
    that a shard set was made from, "" for plain pictures. Only pixels are read, so it does not matter which autoencoder
    a shard set was encoded with: models that bring their own are measured on the same pictures."""

    digest: str
    num: int
    split: str
    kind: str

    def read(self, start: int, stop: int) -> list[Tensor]:
        """Pictures start..stop-1, each uint8 (3,H,W)."""


def check_encoder(data: str, encoder_identity: str | None, model_identity: str) -> None:
    """Raise `UserError` when `data`, which a model was trained on, was encoded by another autoencoder than the model's;
    None: it holds pixels only."""
    if encoder_identity not in (None, model_identity):
        raise UserError(
            f"{data} was encoded by autoencoder {str(encoder_identity)[:12]}, but the model's is "
            f"{model_identity[:12]}; preprocess again with the model's autoencoder"
        )


def open_pictures(url: str, split: str = "val") -> Pictures:
    """A shard set (it has a manifest.json) or a folder of pictures."""
    if storage.exists(storage.join(url, MANIFEST_NAME)):
        return ShardPictures(url, split)
    return FolderPictures(url)


class ShardPictures:
    """The pixels of one split of a shard set, in plan order. The digest is the manifest's."""

    def __init__(self, url: str, split: str) -> None:
        self.url, self.split = url, split
        manifest = load_manifest(url)
        if not manifest.splits.get(split):
            raise UserError(f"{url} has no split {split!r}; it has {', '.join(manifest.splits) or 'none'}")
        self.digest, self.num = manifest.digest, manifest.splits[split]
        self.kind = str(manifest.source.get("kind", ""))

    def read(self, start: int, stop: int) -> list[Tensor]:
        loader = ShardLoader(
            self.url,
            split=self.split,
            batch_size=stop - start,
            flip=False,
            latents=False,
            shuffle=False,
            num_epochs=1,
            num_threads=1,
            shards_ahead=0,  # it would be given up again with this loader
        )
        with loader:
            loader.load_state_dict({**loader.state_dict(), "position": start})
            pixels = next(iter(loader)).pixels
        assert pixels is not None
        return list(pixels)


class FolderPictures:
    """Every picture under a folder, sorted by name. The digest covers names and contents."""

    split = ""
    kind = ""

    def __init__(self, url: str) -> None:
        self.url = url
        self.names = [n for n in storage.list_files(url) if is_picture_name(n)]
        self.num = len(self.names)
        if not self.names:
            raise UserError(f"no data at {url}: neither a shard set (manifest.json) nor a folder of pictures")
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name} {storage.sha256_file(storage.join(url, name))}\n".encode())
        self.digest = digest.hexdigest()

    def read(self, start: int, stop: int) -> list[Tensor]:
        return [self._read_one(name) for name in self.names[start:stop]]

    def _read_one(self, name: str) -> Tensor:
        where = storage.join(self.url, name)
        picture = read_picture(storage.read_bytes(where), where, _MAX_PIXELS)
        return to_uint8(to_tensor(picture))[0]


def square(picture: Tensor, size: int) -> Tensor:
    """uint8 (3,H,W) → centre square, anti-aliased to (3,size,size)."""
    from pipeline.metrics.ssim import resize_pictures

    side = min(picture.shape[-2:])
    top, left = (picture.shape[-2] - side) // 2, (picture.shape[-1] - side) // 2
    cropped = picture[:, top : top + side, left : left + side]
    return resize_pictures(cropped[None], (size, size))[0] if side != size else cropped


def stack(pictures: list[Tensor]) -> Tensor:
    return torch.stack(pictures)
