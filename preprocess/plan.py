"""The plan: which sample is where, decided before any image is read. A pure function of the source list and settings.

    sorted ids → split by id → seeded shuffle of the images → their crops, side by side → shards → encode batches

Crops of one image stay together, so that a large photograph is decoded once; the loader shuffles samples anyway.
"""

from __future__ import annotations

import gzip
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import sha256_bytes
from preprocess.config import PreprocessConfig
from preprocess.names import NameIndex, composed, within
from preprocess.pictures.crops import grid_boxes, unit_values
from preprocess.pictures.images import oriented_size, use_own_size_limit
from preprocess.pictures.reading import read_image
from preprocess.rejects import Reject
from preprocess.retry import PATIENT
from preprocess.shards.canonical import canonical_json
from preprocess.shards.sample import SCHEMA_VERSION
from preprocess.sources.base import Source


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image of a shard and its crops [first_crop, first_crop + num_crops)."""

    image: str
    first_crop: int
    num_crops: int


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard. Its samples have plan positions [first_index, first_index + num_samples)."""

    number: int
    split: str
    first_index: int
    num_samples: int
    images: tuple[PlannedImage, ...]
    copies: tuple[tuple[str, int], ...] = ()
    """Instead of images: samples of an earlier state of the set, as (shard, position in it)."""

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}"


@dataclass(frozen=True)
class Plan:
    """All shards, and `facts`: the plain values whose hash says whether two runs make the same bytes."""

    shards: list[ShardPlan]
    num_images: int
    num_samples: int
    source_bytes: int
    listing: bytes
    facts: dict[str, Any]
    left_out: dict[str, int] = field(default_factory=dict)
    """Files of the source that are not among the images, by kind. They do not decide any bytes."""
    num_shards_ever: int = 0
    num_keys_ever: int = 0
    """Shard numbers and keys that this set and those it grew from have used; 0 for a set that did not grow."""

    @property
    def hash(self) -> str:
        return sha256_bytes(canonical_json(self.facts))


def make_plan(
    config: PreprocessConfig, source: Source, autoencoder: dict[str, Any] | None, versions: dict[str, str]
) -> Plan:
    """Plan a run. `autoencoder` holds its identity and stored shape (None: pixels only)."""
    use_own_size_limit()
    listed = sorted(source.list_images())
    left_out = Counter(source.left_out())
    listed = _usable(listed, config.policy, left_out)
    splits = assign_splits(config, source, [image for image, _ in listed])
    sizes = dict(listed)
    ordered = {name: _shuffle(images, config.seed) for name, images in splits.items()}
    left_out["in neither list"] = len(listed) - sum(map(len, ordered.values()))
    if config.limit:
        left_out["beyond --limit"] = sum(max(0, len(images) - config.limit) for images in ordered.values())
        ordered = {name: images[: config.limit] for name, images in ordered.items()}
    used = [image for name in sorted(ordered) for image in ordered[name]]
    num_crops = count_crops(config, source, used)
    shards: list[ShardPlan] = []
    first_index = 0
    for name in sorted(ordered):
        for shard in plan_shards(name, ordered[name], num_crops, config.samples_per_shard, len(shards), first_index):
            shards.append(shard)
            first_index += shard.num_samples
    listing = "".join(f"{image}\t{sizes[image]}\t{num_crops[image]}\n" for image in sorted(used)).encode()
    facts = {
        "schema_version": SCHEMA_VERSION,
        "source": {"kind": config.source, "split": config.split, "num_images": len(used),
                   "listing_sha256": sha256_bytes(listing)},
        "splits": {name: sum(s.num_samples for s in shards if s.split == name) for name in sorted(ordered)},
        "split_sha256": _split_hash(ordered),
        "transform": config.transform(),
        "shards": {"samples_per_shard": config.samples_per_shard, "shard_bytes": config.shard_bytes,
                   "batch_size": config.batch_size},
        "encoder": None if autoencoder is None else {
            **autoencoder, "device": config.device.split(":")[0], "threads": config.encode_threads},
        "versions": versions,
    }  # fmt: skip
    source_bytes = sum(max(sizes[image], 0) for image in used)
    return Plan(shards, len(used), first_index, source_bytes, listing, facts, dict(+left_out))


def listing_file(plan: Plan) -> bytes:
    """The source list as stored beside the shards, so that a later run can name what changed."""
    return gzip.compress(plan.listing, 6, mtime=0)


def assign_splits(config: PreprocessConfig, source: Source, images: list[str]) -> dict[str, list[str]]:
    """Images of each split, in sorted order. Splits are by image, so no crop of a held-out image is trained on."""
    asked = [name for name in ("val_fraction", "val_folder", "val_list") if getattr(config, name)]
    if config.train_list and not config.val_list:
        raise UserError("--train-list needs --val-list: the images that are held out")
    if len(asked) > 1:
        flags = ", ".join(
            "--" + name.replace("_", "-") for name in [*asked, *(["train_list"] * bool(config.train_list))]
        )
        raise UserError(
            f"{flags} do not go together; use --val-fraction, --val-folder, or --val-list (with --train-list)"
        )
    if config.val_list:
        return _split_by_lists(config, source, images)
    splits: dict[str, list[str]] = {}
    prefix = within(config.val_folder, config.source_url) + "/" if config.val_folder else ""
    for image in images:
        split = source.split_of(image) or "train"
        if config.val_folder:
            split = "val" if composed(image).startswith(prefix) else "train"
        elif config.val_fraction:
            split = "val" if unit_values(1, "split", config.seed, image)[0] < config.val_fraction else "train"
        splits.setdefault(split, []).append(image)
    if asked and not (splits.get("val") and splits.get("train")):
        empty = "val" if "train" in splits else "train"
        value = getattr(config, asked[0])
        raise UserError(f"--{asked[0].replace('_', '-')} {value} leaves no image for the split {empty!r}")
    return splits


def _split_by_lists(config: PreprocessConfig, source: Source, images: list[str]) -> dict[str, list[str]]:
    names = NameIndex(images, config.source_url, source.aliases)
    val = names.find_all(config.val_list)
    train = names.find_all(config.train_list) if config.train_list else set(images) - val
    both = sorted(train & val)
    if both:
        raise UserError(f"{both[0]} is in both {config.train_list} and {config.val_list}")
    for name, found, url in (("val", val, config.val_list), ("train", train, config.train_list or config.val_list)):
        if not found:
            raise UserError(f"{url} leaves no image for the split {name!r}")
    return {"train": sorted(train), "val": sorted(val)}


def count_crops(config: PreprocessConfig, source: Source, images: list[str]) -> dict[str, int]:
    """Crops of each image. Only a grid needs to know sizes; it reads headers."""
    if config.crop != "grid":
        return dict.fromkeys(images, config.crops_per_image)
    side = config.crop_pixels or config.size
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(images, pool.map(lambda image: _grid_count(config, source, image, side), images)))


def _grid_count(config: PreprocessConfig, source: Source, image: str, side: int) -> int:
    try:
        height, width = oriented_size(read_image(source, image, config.retries, PATIENT.counter), config.max_pixels)
    except Reject:
        return 1  # rejected, and counted, when it is decoded
    return max(1, len(grid_boxes(height, width, side)))


def _usable(listed: list[tuple[str, int]], policy: str, left_out: Counter[str]) -> list[tuple[str, int]]:
    """Without the names that no text file can hold: control characters, bytes that are no text. With --policy fail such
    a name raises `UserError`."""
    for (image, _), (following, _) in zip(listed, listed[1:]):
        if image == following:
            raise UserError(f"the source lists {image!r} twice; ids must be unique")
    bad = [image for image, _ in listed if any(unicodedata.category(c) in ("Cc", "Cs") for c in image)]
    if bad and policy == "fail":
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"the name {bad[0]!r}{more} has characters that are no text; rename, or use --policy skip")
    left_out["unusable names"] += len(bad)
    without = set(bad)
    return [(image, size) for image, size in listed if image not in without] if bad else listed


def _shuffle(images: list[str], seed: int) -> list[str]:
    def rank(image: str) -> bytes:
        return hashlib.blake2b(image.encode(), digest_size=16, key=f"shuffle {seed}".encode()).digest()

    return sorted(images, key=rank)


def _split_hash(ordered: dict[str, list[str]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(ordered):
        for image in ordered[name]:
            digest.update(f"{name}\t{image}\n".encode())
    return digest.hexdigest()


def plan_shards(
    split: str, images: Iterable[str], num_crops: dict[str, int], per_shard: int, number: int, first_index: int
) -> Iterable[ShardPlan]:
    """One split as shards of `per_shard` samples, numbered from `number` on, whose samples have plan positions from
    `first_index` on. The last may be shorter; an image's crops may lie in two shards."""
    parts: list[PlannedImage] = []
    filled = 0
    for image in images:
        crop = 0
        while crop < num_crops[image]:
            take = min(num_crops[image] - crop, per_shard - filled)
            parts.append(PlannedImage(image, crop, take))
            crop, filled = crop + take, filled + take
            if filled == per_shard:
                yield ShardPlan(number, split, first_index, filled, tuple(parts))
                parts, number, first_index, filled = [], number + 1, first_index + filled, 0
    if filled:
        yield ShardPlan(number, split, first_index, filled, tuple(parts))
