"""`--update`: a finished set follows its source. What is unchanged stays or is copied; only the rest is encoded.

An image is unchanged when the content of its file and its crops are; encoder and transform must be the set's. Shards
all of whose samples are unchanged stay as they are; what is left of the others is copied into new shards, and new or
changed images are encoded into further ones. Old shards are not deleted: the old manifest, kept beside the new one,
still describes a whole set.

The outcome is a plan like any other: a pure function of the old manifest and the source, so a killed update continues.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.differences import differences
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import exists, join, read_bytes, sha256_bytes, write_bytes
from preprocess.config import PreprocessConfig
from preprocess.pictures.reading import read_image
from preprocess.plan import Plan, PlannedImage, ShardPlan, plan_shards
from preprocess.rejects import Reject
from preprocess.resume import listed_sizes
from preprocess.retry import PATIENT
from preprocess.shards.cache import ShardCache
from preprocess.shards.canonical import canonical_json
from preprocess.shards.manifest import MANIFEST_NAME, Manifest, load_manifest
from preprocess.shards.reader import ShardReader
from preprocess.shards.receipt import Receipt, finished_receipts, load_receipt, without_index
from preprocess.shards.sample import Sample
from preprocess.sources.base import Source

_BATCH = 64


@dataclass(frozen=True)
class Growth:
    """plan: of the whole new set. kept: receipts of shards that stay, by name. num_*: samples kept, and copied."""

    base: Manifest
    plan: Plan
    kept: dict[str, Receipt]
    num_kept: int
    num_copied: int

    @property
    def changes_nothing(self) -> bool:
        return len(self.kept) == len(self.base.shards) == len(self.plan.shards)


@dataclass
class _Known:
    """What the set holds of one image: its content's hash ("" where it could not be read), its split, and (shard,
    position) of its samples."""

    sha256: str
    split: str
    places: list[tuple[str, int]]


def base_manifest(dest: str) -> Manifest | None:
    """The manifest of the finished set in `dest`, if there is one."""
    return load_manifest(dest) if exists(join(dest, MANIFEST_NAME), retries=PATIENT) else None


def require_same_kind(config: PreprocessConfig, base: Manifest, facts: dict[str, Any] | None) -> None:
    """Refuse to mix: samples of another transform or encoder."""
    changed = list(differences(base.transform, json.loads(json.dumps(config.transform()))))
    identity = facts["identity"] if facts else None
    if identity != base.autoencoder_identity:
        was = (base.autoencoder_identity or "none")[:12]
        changed.append(f"the autoencoder was {was}, now {(identity or 'none')[:12]}")
    if changed:
        raise UserError(
            f"{config.dest} holds other samples: {'; '.join(changed)}. --update keeps transform and encoder; for "
            "another transform use another folder, for another encoder `preprocess reencode`"
        )


def grown(config: PreprocessConfig, source: Source, full: Plan, base: Manifest) -> Growth:
    """The plan of `base` brought up to date with the source, whose plan as a new set is `full`."""
    plans = {entry.name: entry.plan or base.plan for entry in base.shards}
    whole, troubles = finished_receipts(config.dest, plans, config.recheck)
    for trouble in troubles:
        print(f"encoding anew: {trouble}", file=sys.stderr)
    receipts = {name: load_receipt(config.dest, name) for name in whole}
    known, rejected = _known(config, base, receipts), _rejected(receipts)
    wanted, splits = _images(full)
    same = _unchanged(config, source, {**rejected, **known}, wanted)
    good = {image for image in same if image in known}
    stays = {image for image in good if known[image].split == splits[image]}
    still = {name for name, r in receipts.items() if all(_image(config, sample) in stays for sample in r["ids"])}
    bad = {
        image
        for image in same - good
        if rejected[image].split == splits[image] and {name for name, _ in rejected[image].places} <= still
    }
    kept = {}
    for name in receipts:
        rejects = [reject for reject in receipts[name]["rejects"] if reject["image"] in bad]
        if name in still and (receipts[name]["ids"] or rejects):
            kept[name] = {**without_index(receipts[name]), "rejects": rejects}
    copied: dict[str, list[tuple[str, int]]] = {split: [] for split in full.facts["splits"]}
    for image in sorted(good, key=lambda image: known[image].places):
        copied[splits[image]] += [place for place in known[image].places if place[0] not in kept]
    old = good | bad
    new = {split: [i for i in wanted if i not in old and splits[i] == split] for split in copied}
    return _growth(config, full, base, kept, copied, new, {i: wanted[i].num_crops for i in wanted}, known)


def _growth(
    config: PreprocessConfig, full: Plan, base: Manifest, kept: dict[str, Receipt],
    copied: dict[str, list[tuple[str, int]]], new: dict[str, list[str]], num_crops: dict[str, int],
    known: dict[str, _Known],
) -> Growth:  # fmt: skip
    shards = [
        ShardPlan(int(name.removeprefix("shard-")), r["split"], r["first_index"], _num_planned(r), ())
        for name, r in kept.items()
    ]
    number, first = base.num_shards_ever or len(base.shards), base.num_keys_ever or base.num_samples + base.num_rejected
    for split in sorted(copied):
        for start in range(0, len(copied[split]), config.samples_per_shard):
            places = tuple(copied[split][start : start + config.samples_per_shard])
            shards.append(ShardPlan(number, split, first, len(places), (), places))
            number, first = number + 1, first + len(places)
        for shard in plan_shards(split, new[split], num_crops, config.samples_per_shard, number, first):
            shards.append(shard)
            number, first = number + 1, first + shard.num_samples
    seen = {image: known[image].sha256 if image in known else "" for split in sorted(new) for image in new[split]}
    facts = {
        **full.facts,
        "grown": {
            "from": base.digest,
            "kept": sha256_bytes(canonical_json(sorted(kept))),
            "copied": sha256_bytes(canonical_json(copied)),
            "new": sha256_bytes(canonical_json(seen)),
        },
    }
    num_kept = sum(int(receipt["num_samples"]) for receipt in kept.values())
    num_samples = sum(shard.num_samples for shard in shards)
    plan = dataclasses.replace(
        full, shards=shards, num_samples=num_samples, facts=facts, num_shards_ever=number, num_keys_ever=first
    )
    return Growth(base, plan, kept, num_kept, sum(map(len, copied.values())))


def _num_planned(receipt: Receipt) -> int:
    """Samples of a shard, and those that its rejected images would have given."""
    return int(receipt["num_samples"]) + sum(reject["num_samples"] for reject in receipt["rejects"])


def _image(config: PreprocessConfig, sample: str) -> str:
    return sample.rpartition("#")[0] if config.is_numbered else sample


def _known(config: PreprocessConfig, base: Manifest, receipts: dict[str, Receipt]) -> dict[str, _Known]:
    known: dict[str, _Known] = {}
    carrier = Carrier(config.dest, base)
    for name, receipt in receipts.items():
        hashes = receipt.get("sources") or carrier.hashes(name)  # sets from before receipts had them
        for position, (sample, sha256) in enumerate(zip(receipt["ids"], hashes)):
            found = known.setdefault(_image(config, sample), _Known(sha256, receipt["split"], []))
            found.places.append((name, position))
    return known


def _rejected(receipts: dict[str, Receipt]) -> dict[str, _Known]:
    """The same of the images that were rejected: a place for each sample that they would have given."""
    rejected: dict[str, _Known] = {}
    for name, receipt in receipts.items():
        for reject in receipt["rejects"]:
            content = reject.get("sha256", "unknown")  # sets from before receipts had it try such an image again
            found = rejected.setdefault(reject["image"], _Known(content, receipt["split"], []))
            found.places += [(name, -1)] * reject["num_samples"]
    return rejected


def _images(full: Plan) -> tuple[dict[str, PlannedImage], dict[str, str]]:
    """Image → all its crops, and its split; crops that lie in two shards are put together."""
    wanted: dict[str, PlannedImage] = {}
    splits: dict[str, str] = {}
    for shard in full.shards:
        for planned in shard.images:
            before = wanted[planned.image].num_crops if planned.image in wanted else 0
            wanted[planned.image] = PlannedImage(planned.image, 0, before + planned.num_crops)
            splits[planned.image] = shard.split
    return wanted, splits


def _unchanged(
    config: PreprocessConfig, source: Source, known: dict[str, _Known], wanted: dict[str, PlannedImage]
) -> set[str]:
    """Images whose samples can stay: as many crops, and the same content (or, with --recheck size, as many bytes)."""
    images = [image for image in wanted if image in known and len(known[image].places) == wanted[image].num_crops]
    if config.recheck == "size":
        earlier, now = listed_sizes(config.dest), dict(source.list_images())
        return {image for image in images if earlier.get(image) == now.get(image) != -1}

    def is_same(image: str) -> bool:
        try:
            content = sha256_bytes(read_image(source, image, config.retries, PATIENT.counter))
        except Reject:
            content = ""
        return content == known[image].sha256

    def same_among(some: list[str]) -> list[str]:
        return [image for image in some if is_same(image)]

    same: set[str] = set()
    parts = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    with (
        Progress("looking for changes", len(images), "images") as progress,
        ThreadPoolExecutor(2 * config.decode_threads) as pool,
    ):
        for part, unchanged in zip(parts, pool.map(same_among, parts)):
            same.update(unchanged)
            progress.update(len(part))
    return same


class Carrier:
    """Samples of a finished set, read to be written again under other keys."""

    def __init__(self, dest: str, base: Manifest) -> None:
        self.dest, self.base = dest, base
        self._entries = {entry.name: entry for entry in base.shards}
        self._open: tuple[str, ShardReader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"dest": self.dest, "base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["dest"], state["base"])  # type: ignore[misc]

    def samples(self, shard: ShardPlan) -> Iterator[list[Sample]]:
        """The samples of a shard of copies, some at a time."""
        for start in range(0, shard.num_samples, _BATCH):
            places = shard.copies[start : start + _BATCH]
            yield [self._sample(shard.first_index + start + n, *place) for n, place in enumerate(places)]

    def hashes(self, name: str) -> list[str]:
        """Hash of the source of each sample of a shard."""
        reader = self._reader(name)
        return [json.loads(bytes(reader.member(n, "json")))["sha256"] for n in range(len(reader.ids))]

    def _sample(self, index: int, name: str, position: int) -> Sample:
        reader = self._reader(name)
        latents = [suffix for suffix in self.base.suffixes if suffix.endswith(".npy")]
        return Sample(
            index,
            json.loads(bytes(reader.member(position, "json"))),
            bytes(reader.member(position, self.base.pixel_format)),
            {suffix: np.array(reader.latent(position, suffix)) for suffix in latents},
        )

    def _reader(self, name: str) -> ShardReader:
        if self._open is None or self._open[0] != name:
            entry = self._entries[name]
            with ShardCache(self.dest, None, 64 << 30).open(entry) as file:
                self._open = (name, ShardReader(file, load_receipt(self.dest, name), entry, self.base))
        return self._open[1]


def keep_manifest(dest: str, base: Manifest) -> None:
    """Put a copy of the present manifest beside it, under its digest, before another takes its place."""
    url = join(dest, f"manifest-{base.digest[:12]}.json")
    if not exists(url, retries=PATIENT):
        write_bytes(url, read_bytes(join(dest, MANIFEST_NAME), retries=PATIENT), retries=PATIENT)
