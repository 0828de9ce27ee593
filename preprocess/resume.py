"""Continuing an earlier run: only one of the very same plan, else what differs is named."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

from pipeline.differences import differences
from pipeline.errors import UserError
from pipeline.storage import exists, join, read_bytes, sha256_bytes, write_bytes
from preprocess.config import PreprocessConfig
from preprocess.plan import Plan, listing_file
from preprocess.retry import PATIENT
from preprocess.shards.canonical import canonical_json
from preprocess.shards.manifest import MANIFEST_NAME, load_manifest

PLAN_NAME = "plan.json"
LISTING_NAME = "sources.txt.gz"


def accept_or_refuse(config: PreprocessConfig, plan: Plan) -> None:
    """Continue only a run of the same plan; otherwise name what differs."""
    url = join(config.dest, PLAN_NAME)
    if not exists(url, retries=PATIENT):
        if exists(join(config.dest, "shard-000000.tar"), retries=PATIENT) and not _is_finished(config, plan):
            raise UserError(f"{config.dest} holds shards but no {PLAN_NAME}; choose an empty folder")
        return
    earlier = read_plan(config.dest)
    if earlier is None:
        return  # damaged: receipts carry the plan's hash too, so foreign shards are rebuilt, never mixed in
    changed = list(differences(earlier, json.loads(json.dumps(plan.facts))))
    of_source = [name for name in changed if name.startswith(("source.", "splits.", "split_sha256"))]
    if changed and config.update and changed == of_source:
        return  # begun, never finished, and the source is another now: shards of the earlier plan are built anew
    if changed:
        if any(name.startswith("source.") for name in changed):
            changed.append(_changed_images(config, plan))
        raise UserError(
            f"{config.dest} was begun differently: {'; '.join(changed)}. Use the settings it was begun with, "
            "another folder, or --update where only the images changed"
        )


def _is_finished(config: PreprocessConfig, plan: Plan) -> bool:
    """Whether the destination's manifest says that it holds this very plan."""
    return exists(join(config.dest, MANIFEST_NAME), retries=PATIENT) and load_manifest(config.dest).plan == plan.hash


def read_plan(dest: str) -> dict[str, Any] | None:
    """The facts of the plan that `dest` was begun with; None when there is none, or it is damaged."""
    url = join(dest, PLAN_NAME)
    if not exists(url, retries=PATIENT):
        return None
    try:
        stored = json.loads(read_bytes(url, retries=PATIENT))
        return stored["facts"] if sha256_bytes(canonical_json(stored["facts"])) == stored["sha256"] else None
    except (ValueError, KeyError, TypeError):
        return None


def plan_file(plan: Plan) -> bytes:
    return (json.dumps({"facts": plan.facts, "sha256": plan.hash}, indent=1, sort_keys=True) + "\n").encode()


def listed_sizes(dest: str) -> dict[str, int]:
    """Image → bytes as they were when the set in `dest` was planned; empty where that is not known."""
    try:
        text = gzip.decompress(read_bytes(join(dest, LISTING_NAME), retries=PATIENT)).decode()
    except (OSError, EOFError, ValueError, zlib.error):
        return {}
    rows = (line.split("\t") for line in text.split("\n") if line)
    return {image: int(size) for image, size, _ in rows}


def _changed_images(config: PreprocessConfig, plan: Plan) -> str:
    """Names the first images whose presence or size changed since the run was begun."""
    url = join(config.dest, LISTING_NAME)
    if not exists(url, retries=PATIENT):
        return "changed images unknown"
    try:
        earlier = set(gzip.decompress(read_bytes(url, retries=PATIENT)).decode().split("\n"))
    except (OSError, EOFError, ValueError, zlib.error):
        return "changed images unknown"
    changed = sorted({line.split("\t")[0] for line in earlier ^ set(plan.listing.decode().split("\n"))})
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"changed images: {', '.join(changed[:3])}{more}"


def write_plan(config: PreprocessConfig, plan: Plan) -> None:
    """Write the plan and the list of sources, or mend them; what is whole stays untouched."""
    for name, content in ((LISTING_NAME, listing_file(plan)), (PLAN_NAME, plan_file(plan))):
        url = join(config.dest, name)
        if not exists(url, retries=PATIENT) or read_bytes(url, retries=PATIENT) != content:
            write_bytes(url, content, retries=PATIENT)
