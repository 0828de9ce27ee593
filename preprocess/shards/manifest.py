"""`manifest.json`, written last: what a shard set holds, how it was made, and the statistics that training needs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import from_dict
from pipeline.errors import UserError
from pipeline.storage import exists, join, read_bytes, sha256_bytes
from preprocess.retry import PATIENT
from preprocess.shards.canonical import canonical_json
from preprocess.shards.sample import SCHEMA_VERSION, check_suffixes

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard as the manifest lists it. receipt_sha256: of the receipt file. plan: hash of the plan that made it,
    where that is not the manifest's: a shard of an earlier state of the set."""

    name: str
    split: str
    num_samples: int
    bytes: int
    sha256: str
    receipt_sha256: str
    plan: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete shard set.

    autoencoder_identity: None for pixels only. latent_shape: (S,h,w) as stored. latent_mean, latent_std: per channel,
    unscaled. scale_factor: 1/std over the whole set. splits: samples of each split. counts: images and samples in,
    out and rejected. left_out: files of the source that are no images, by kind. grown_from: digest of
    the manifest before (`--update`); num_*_ever: shard numbers and keys used so far, 0 where none was ever given up.
    digest: sha256 of everything else here.
    """

    schema_version: int
    plan: str
    source: dict[str, Any]
    splits: dict[str, int]
    size: int
    pixel_format: str
    suffixes: list[str]
    transform: dict[str, Any]
    transform_identity: str
    autoencoder_identity: str | None = None
    autoencoder: dict[str, Any] | None = None
    latent_shape: list[int] | None = None
    dtype: str = "float16"
    flips: bool = False
    lr_sizes: list[int] = field(default_factory=list)
    latent_mean: list[float] | None = None
    latent_std: list[float] | None = None
    scale_factor: float = 1.0
    num_samples: int = 0
    num_images: int = 0
    num_rejected: int = 0
    num_rejected_images: int = 0
    ledger_sha256: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    grown_from: str = ""
    num_shards_ever: int = 0
    num_keys_ever: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    shards: list[ShardEntry] = field(default_factory=list)
    digest: str = ""

    @property
    def condition_cells(self) -> str:
        """Latent grid of the conditions: "image" or "input" (see `PreprocessConfig`)."""
        return str(self.transform.get("condition_cells", "image"))

    def to_bytes(self) -> bytes:
        """File content, sealed with its own hash."""
        body = dataclasses.asdict(self)
        del body["digest"]
        for name in _NEWER:  # as before there were such fields
            if not body[name]:
                del body[name]
        for entry in body["shards"]:
            if not entry["plan"]:
                del entry["plan"]
        body["digest"] = sha256_bytes(canonical_json(body))
        return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


_NEWER = ("left_out", "grown_from", "num_shards_ever", "num_keys_ever")
"""Fields that are written only where they say something, so that sets without them keep their digest."""


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in `data`. Damage, another schema version and members outside the contract raise `UserError`."""
    try:
        body = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    if not isinstance(body, dict) or "schema_version" not in body:
        raise UserError(f"{where} is not a shard set manifest")
    if body["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {body['schema_version']}; this program reads {SCHEMA_VERSION}: "
            "preprocess again, or use the version that wrote it"
        )
    digest = body.pop("digest", "")
    if sha256_bytes(canonical_json(body)) != digest:
        raise UserError(f"{where} is damaged: its own checksum does not match")
    entries = [from_dict(ShardEntry, entry, f"{where}: shards") for entry in body.pop("shards", [])]
    manifest = from_dict(Manifest, {**body, "digest": digest}, where)
    check_suffixes(manifest.suffixes, where)
    return dataclasses.replace(manifest, shards=entries)


def folder_of(url: str) -> str:
    """The folder of a shard set that is named by its folder, or by one of its manifests."""
    return url.rsplit("/", 1)[0] if url.endswith(".json") and "/" in url else "." if url.endswith(".json") else url


def load_manifest(url: str) -> Manifest:
    """The manifest of the shard set in folder `url`; of an earlier state where `url` is `.../manifest-DIGEST.json`."""
    if url.endswith(".json"):
        return parse_manifest(read_bytes(url, retries=PATIENT), url)
    path = join(url, MANIFEST_NAME)
    if not exists(path, retries=PATIENT):
        hint = (
            "its preprocessing did not finish: run it again"
            if exists(join(url, "plan.json"), retries=PATIENT)
            else "wrong folder?"
        )
        raise UserError(f"{url} holds no {MANIFEST_NAME}; {hint}")
    return parse_manifest(read_bytes(path, retries=PATIENT), path)
