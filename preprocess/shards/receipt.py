"""The receipt of a shard, `shard-000000.json`: published after the shard, so its presence means the shard is done.

It also is the shard's index: where each member of each sample lies.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec

from pipeline.errors import UserError
from pipeline.storage import exists, filesystem, join, read_bytes, sha256_bytes, sha256_file
from preprocess.retry import PATIENT
from preprocess.shards.canonical import canonical_json
from preprocess.shards.sample import SCHEMA_VERSION

Receipt = dict[str, Any]
_FIELDS = frozenset(
    {"schema_version", "name", "split", "plan", "bytes", "sha256", "num_samples", "first_index", "suffixes", "ids"}
    | {"offsets", "rejects", "latents", "digest"}
)


def seal(receipt: Receipt) -> bytes:
    """A receipt as file content, with the hash that reveals damage of the receipt itself."""
    body = {name: value for name, value in receipt.items() if name != "digest"}
    body["digest"] = sha256_bytes(canonical_json(body))
    return (json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n").encode()


def parse_receipt(data: bytes, where: str) -> Receipt:
    """The receipt in `data`. Anything but an undamaged one of this schema raises `UserError`."""
    try:
        receipt = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    if not isinstance(receipt, dict) or not _FIELDS.issubset(receipt):
        raise UserError(f"{where} is damaged or no shard receipt: fields are missing")
    if receipt["schema_version"] != SCHEMA_VERSION:
        raise UserError(f"{where} has schema version {receipt['schema_version']}; this program reads {SCHEMA_VERSION}")
    if seal(receipt) != data:
        raise UserError(f"{where} is damaged: its own checksum does not match")
    return receipt


def without_index(receipt: Receipt) -> Receipt:
    """What a run keeps of a receipt: all but what there is of each sample, which would grow with the data set."""
    kept = {name: value for name, value in receipt.items() if name not in ("ids", "offsets", "sources")}
    return {**kept, "receipt_sha256": sha256_bytes(seal(receipt))}


def load_receipt(dest: str, name: str) -> Receipt:
    url = join(dest, name + ".json")
    return parse_receipt(read_bytes(url, retries=PATIENT), url)


def shard_trouble(dest: str, name: str, receipt: Receipt, recheck: str) -> str | None:
    """What is wrong with the shard that `receipt` describes, or None. recheck: "hash" or "size"."""
    url = join(dest, name + ".tar")
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        size = int(PATIENT(lambda: fs.size(path), f"looking at {url}") or 0)
    except FileNotFoundError:
        return f"{url} is missing"
    if size != receipt["bytes"]:
        return f"{url} has {size} bytes instead of {receipt['bytes']}"
    if recheck == "hash" and sha256_file(url, retries=PATIENT) != receipt["sha256"]:
        return f"{url} is damaged: its checksum does not match"
    return None


def finished_receipts(dest: str, plans: dict[str, str], recheck: str) -> tuple[dict[str, Receipt], list[str]]:
    """Receipts of shards that are done and whole, and one line for each that has to be built again. plans: the shards'
    names, and the hash of the plan that each belongs to."""
    present = _files(dest)

    def check(name: str) -> tuple[Receipt | None, str | None]:
        if name + ".json" not in present:
            return None, None
        try:
            receipt = load_receipt(dest, name)
        except UserError as error:
            return None, str(error)
        if receipt["plan"] != plans[name] or receipt["name"] != name:
            return None, f"{join(dest, name)}.json belongs to another plan"
        trouble = shard_trouble(dest, name, receipt, recheck)
        return (None, trouble) if trouble else (without_index(receipt), None)

    with ThreadPoolExecutor(max_workers=4) as pool:
        results = dict(zip(plans, pool.map(check, plans)))
    done = {name: receipt for name, (receipt, _) in results.items() if receipt is not None}
    return done, [trouble for _, trouble in results.values() if trouble]


def _files(dest: str) -> set[str]:
    """Names directly in `dest`."""
    fs: fsspec.AbstractFileSystem
    fs, path = filesystem(dest)
    fs.invalidate_cache()
    if not exists(dest, retries=PATIENT):
        return set()
    names = PATIENT(lambda: fs.ls(path, detail=False), f"listing {dest}")
    return {str(name).rsplit("/", 1)[-1] for name in names}
