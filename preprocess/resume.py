"""Continuing an earlier run: only one of the very same plan, else what differs is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError
from pipeline.storage import exists, join, read_bytes, read_json, write_bytes
from preprocess.config import PreprocessConfig
from preprocess.plan import Plan, listing_file

PLAN_NAME = "plan.json"
LISTING_NAME = "sources.txt.gz"


def accept_or_refuse(config: PreprocessConfig, plan: Plan) -> None:
    """Continue only a run of the same plan; otherwise name what differs."""
    url = join(config.dest, PLAN_NAME)
    if not exists(url):
        if exists(join(config.dest, "shard-000000.tar")):
            raise UserError(f"{config.dest} holds shards but no {PLAN_NAME}; choose an empty folder")
        return
    earlier = read_json(url)
    differences = list(_differences(earlier, json.loads(json.dumps(plan.facts))))
    if differences:
        if any(name.startswith("source.") for name in differences):
            differences.append(_changed_images(config, plan))
        raise UserError(
            f"{config.dest} was begun differently: {'; '.join(differences)}. Use the settings it was begun with, "
            "or another folder"
        )


def _differences(earlier: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        for key in sorted(earlier.keys() | now.keys()):
            yield from _differences(earlier.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif earlier != now:
        yield f"{name} was {_short(earlier)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _changed_images(config: PreprocessConfig, plan: Plan) -> str:
    """Names the first images whose presence or size changed since the run was begun."""
    url = join(config.dest, LISTING_NAME)
    if not exists(url):
        return "changed images unknown"
    earlier = set(gzip.decompress(read_bytes(url)).decode().splitlines())
    changed = sorted({line.split("\t")[0] for line in earlier ^ set(plan.listing.decode().splitlines())})
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"changed images: {', '.join(changed[:3])}{more}"


def write_plan(config: PreprocessConfig, plan: Plan) -> None:
    if not exists(join(config.dest, PLAN_NAME)):
        write_bytes(join(config.dest, LISTING_NAME), listing_file(plan))
        write_bytes(join(config.dest, PLAN_NAME), (json.dumps(plan.facts, indent=1, sort_keys=True) + "\n").encode())
