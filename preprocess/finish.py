"""The end of a run: ledger of rejected images, then the manifest, last of all."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import exists, join, read_bytes, sha256_bytes, write_bytes
from preprocess.config import PreprocessConfig
from preprocess.plan import Plan
from preprocess.retry import PATIENT
from preprocess.shards.canonical import canonical_json
from preprocess.shards.latent_stats import merge
from preprocess.shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, parse_manifest
from preprocess.shards.receipt import Receipt
from preprocess.shards.sample import SCHEMA_VERSION, member_suffixes

LEDGER_NAME = "rejects.jsonl"


def ledger(receipts: list[Receipt]) -> tuple[bytes, int, int]:
    """(`rejects.jsonl`, rejected images, rejected samples). An image whose crops lie in two shards is listed once."""
    entries: dict[str, dict[str, Any]] = {}
    for receipt in receipts:
        for reject in receipt["rejects"]:
            entry = entries.setdefault(reject["image"], {**reject, "id": reject["image"], "num_samples": 0})
            entry["num_samples"] += reject["num_samples"]
    lines = [
        json.dumps({k: entry[k] for k in ("id", "reason", "detail", "num_samples")}, sort_keys=True) + "\n"
        for _, entry in sorted(entries.items())
    ]
    return "".join(lines).encode(), len(entries), sum(e["num_samples"] for e in entries.values())


def build_manifest(
    config: PreprocessConfig, plan: Plan, facts: dict[str, Any] | None, receipts: list[Receipt], ledger_sha256: str,
    num_rejected_images: int, num_rejected: int,
) -> Manifest:  # fmt: skip
    """The manifest of a finished set, receipts in plan order."""
    statistics = merge([r["latents"] for r in receipts if r["latents"]]) or {}
    splits: dict[str, int] = {}
    for receipt in receipts:
        splits[receipt["split"]] = splits.get(receipt["split"], 0) + receipt["num_samples"]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        plan=plan.hash,
        source=plan.facts["source"],
        splits=splits,
        size=config.size,
        pixel_format=config.pixel_format,
        suffixes=member_suffixes(config.pixel_format, facts is not None, config.flips, config.lr_sizes),
        transform=config.transform(),
        transform_identity=sha256_bytes(canonical_json(config.transform())),
        autoencoder_identity=facts["identity"] if facts else None,
        autoencoder=facts["config"] if facts else None,
        latent_shape=facts["latent_shape"] if facts else None,
        dtype=config.dtype,
        flips=facts is not None and config.flips,
        lr_sizes=list(config.lr_sizes) if facts else [],
        num_samples=sum(splits.values()),
        num_images=plan.num_images,
        num_rejected=num_rejected,
        num_rejected_images=num_rejected_images,
        ledger_sha256=ledger_sha256,
        grown_from=plan.facts.get("grown", {}).get("from", ""),
        num_shards_ever=plan.num_shards_ever,
        num_keys_ever=plan.num_keys_ever,
        left_out=dict(sorted(plan.left_out.items())),
        versions=plan.facts["versions"],
        shards=[
            ShardEntry(
                name=r["name"],
                split=r["split"],
                num_samples=r["num_samples"],
                bytes=r["bytes"],
                sha256=r["sha256"],
                receipt_sha256=r["receipt_sha256"],
                plan="" if r["plan"] == plan.hash else r["plan"],
            )
            for r in receipts
        ],
        **statistics,
    )


def finish(
    config: PreprocessConfig, plan: Plan, facts: dict[str, Any] | None, receipts: dict[str, Receipt]
) -> Manifest:
    """Write ledger and manifest. Counts that do not close raise `UserError` and leave no manifest."""
    ordered = [receipts[shard.name] for shard in plan.shards]
    content, num_rejected_images, num_rejected = ledger(ordered)
    num_out = sum(r["num_samples"] for r in ordered)
    if num_out + num_rejected != plan.num_samples:
        raise UserError(
            f"{config.dest}: {plan.num_samples} samples planned, but {num_out} written and {num_rejected} rejected"
        )
    write_bytes(join(config.dest, LEDGER_NAME), content, retries=PATIENT)
    manifest = build_manifest(config, plan, facts, ordered, sha256_bytes(content), num_rejected_images, num_rejected)
    for split, num_samples in manifest.splits.items():
        if not num_samples:
            raise UserError(
                f"no image of the split {split!r} can be used: {num_rejected_images} of {plan.num_images} images are "
                f"rejected; {join(config.dest, LEDGER_NAME)} names them with the reasons"
            )
    url = join(config.dest, MANIFEST_NAME)
    earlier = _whole_manifest(url)
    if earlier and dataclasses.replace(earlier, left_out=manifest.left_out, digest="") == manifest:
        return earlier  # only what lies beside the images changed: training that knows the set goes on with it
    data = manifest.to_bytes()
    write_bytes(url, data, retries=PATIENT)
    return parse_manifest(data, MANIFEST_NAME)


def _whole_manifest(url: str) -> Manifest | None:
    """The manifest at `url`; None where there is none, or none that is whole."""
    try:
        return parse_manifest(read_bytes(url, retries=PATIENT), url) if exists(url, retries=PATIENT) else None
    except UserError:
        return None
