"""Our shards for other trainers: a pipeline of the webdataset library with decoded pixels and latents.

Its order is the library's: samples shuffled in a buffer, shards split by node and by worker. Training here reads the
same shards through `preprocess.shards.loader`, whose order and resume are exact for any number of ranks and which
fetches samples by offset, some thirty times as fast.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import torch
import webdataset as wds

from pipeline.errors import UserError
from pipeline.storage import filesystem, is_local, join
from preprocess.pictures.images import decode_stored
from preprocess.shards.manifest import Manifest, folder_of, load_manifest
from preprocess.shards.sample import PIXEL_FORMATS

_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "memory")


def _open(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> BinaryIO:
    file: BinaryIO = fsspec.open(url, mode).open()
    return file


for _scheme in _SCHEMES:  # also in the workers of a loader, which import this module with `Decode`
    wds.gopen_schemes.setdefault(_scheme, _open)


class Decode:
    """Members of one sample → what trainers take. Arrays are read without pickle."""

    def __init__(self, suffixes: list[str]) -> None:
        self.suffixes = suffixes

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        missing = [suffix for suffix in self.suffixes if suffix not in sample]
        if missing:
            raise UserError(f"{sample.get('__url__')}: sample {sample['__key__']} lacks .{missing[0]}; is the tar cut?")
        decoded: dict[str, Any] = {"__key__": sample["__key__"], "__url__": sample["__url__"]}
        for suffix in self.suffixes:
            data = sample[suffix]
            if suffix == "json":
                decoded["info"] = json.loads(data)
            elif suffix in PIXEL_FORMATS:
                pixels = np.ascontiguousarray(decode_stored(data).transpose(2, 0, 1))
                decoded["pixels"] = torch.from_numpy(pixels)
            else:
                array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
                decoded[suffix.removesuffix(".npy").replace(".", "_")] = torch.from_numpy(array).float()
        return decoded


def as_webdataset(
    url: str, split: str = "train", *, pixels: bool = True, latents: bool = True, shuffle: int = 0, seed: int = 0
) -> wds.WebDataset:
    """A `wds.WebDataset` over the shards of one split, divided by node (`torch.distributed`) and by loader worker.

    Samples are dicts: `info` (the sample's JSON), `pixels` uint8 (3,H,W), `latent` and where cached `flip_latent`,
    `cond16_latent`, `flip_cond16_latent`: float32 (S,h,w) as stored, unscaled. shuffle: samples in the shuffle buffer,
    0 for the stored order; `seed` and the epoch decide the order. Chain further stages as usual (`.batched(16)`), or
    hand it to `wds.WebLoader(dataset, batch_size=None, num_workers=4)`. Every node needs at least one shard to get
    samples. Raises `UserError` for a split that is not there and for shards of the wrong size."""
    manifest = load_manifest(url)
    urls = _urls(folder_of(url), manifest, split)
    wanted = [
        suffix for suffix in manifest.suffixes if suffix == "json" or (pixels if suffix in PIXEL_FORMATS else latents)
    ]
    dataset = wds.WebDataset(
        urls,
        nodesplitter=wds.split_by_node,
        workersplitter=wds.split_by_worker,
        shardshuffle=len(urls) if shuffle else False,
        detshuffle=bool(shuffle),
        empty_check=False,
        seed=seed,
    )
    if shuffle:
        dataset = dataset.compose(wds.filters.detshuffle(shuffle, seed=seed))
    return dataset.map(Decode(wanted))


def _urls(url: str, manifest: Manifest, split: str) -> list[str]:
    entries = [entry for entry in manifest.shards if entry.split == split and entry.num_samples]
    if not entries:
        raise UserError(f"{url} has no split {split!r}; it has {', '.join(manifest.splits) or 'none'}")
    if not is_local(url):
        return [join(url, entry.name + ".tar") for entry in entries]
    urls = [filesystem(join(url, entry.name + ".tar"))[1] for entry in entries]
    for path, entry in zip(urls, entries):  # the library reads a tar that was cut between members without a word
        if not Path(path).is_file() or Path(path).stat().st_size != entry.bytes:
            raise UserError(f"{path} is missing or not {entry.bytes} bytes long; run preprocess again to rebuild it")
    return urls
