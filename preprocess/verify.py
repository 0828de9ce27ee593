"""`latentzoom preprocess verify DEST`: recount and rehash a shard set, without an accelerator or the sources."""

from __future__ import annotations

import gzip
import json
import os
import re
import tarfile
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import filesystem, is_local, join, sha256_bytes
from preprocess.canonical import canonical_json
from preprocess.finish import LEDGER_NAME
from preprocess.manifest import Manifest, ShardEntry, load_manifest
from preprocess.receipt import Receipt, parse_receipt
from preprocess.resume import LISTING_NAME, PLAN_NAME, read_plan
from preprocess.retry import with_retries
from preprocess.sample import key
from preprocess.store import ATTEMPTS, counter, exists, list_files, read_bytes, sha256_file
from preprocess.ustar import read_index


@dataclass
class Report:
    """What `verify` found: damaged or missing files by name, one line each."""

    num_shards: int = 0
    num_samples: int = 0
    damage: list[str] = field(default_factory=list)

    @property
    def damaged_files(self) -> list[str]:
        return sorted({line.split(":", 1)[0] for line in self.damage})


def verify(dest: str, num_threads: int = 4) -> Report:
    """Check every file of the shard set in `dest`. A missing or damaged manifest raises `UserError`."""
    manifest = load_manifest(dest)
    report = Report(num_shards=len(manifest.shards))
    with Progress("verify", len(manifest.shards), "shards") as progress, ThreadPoolExecutor(num_threads) as pool:
        for damage, num_samples in pool.map(lambda entry: _check_shard(dest, entry, manifest), manifest.shards):
            report.damage += damage
            report.num_samples += num_samples
            progress.update()
    report.damage += _check_ledger(dest, manifest, report) + _check_plan(dest, manifest)
    names = list_files(dest)
    earlier = [load_manifest(join(dest, name)) for name in names if re.fullmatch(r"manifest-[0-9a-f]{12}\.json", name)]
    listed = {entry.name for known in (manifest, *earlier) for entry in known.shards}
    for name in names:
        stem, _, suffix = name.partition(".")
        if stem.startswith("shard-") and suffix in ("tar", "json") and stem not in listed:
            report.damage.append(f"{name}: is not in the manifest")
    return report


def _check_shard(dest: str, entry: ShardEntry, manifest: Manifest) -> tuple[list[str], int]:
    """(what is wrong with one shard or its receipt, samples counted)."""
    damage: list[str] = []
    receipt: Receipt | None = None
    try:
        data = read_bytes(join(dest, entry.name + ".json"))
        receipt = parse_receipt(data, entry.name + ".json")
        if sha256_bytes(data) != entry.receipt_sha256 or receipt["plan"] != (entry.plan or manifest.plan):
            damage.append(f"{entry.name}.json: is not the receipt that the manifest lists")
    except UserError as error:
        damage.append(f"{entry.name}.json: {error}")
    try:
        found = sha256_file(join(dest, entry.name + ".tar"))
    except FileNotFoundError:
        return [*damage, f"{entry.name}.tar: is missing"], 0
    if found != entry.sha256:
        return [*damage, f"{entry.name}.tar: checksum differs"], 0
    members, trouble = _recount(dest, entry, receipt, manifest)
    return damage + ([f"{entry.name}.tar: {trouble}"] if trouble else []), members


def _recount(dest: str, entry: ShardEntry, receipt: Receipt | None, manifest: Manifest) -> tuple[int, str | None]:
    """(samples in the tar, what disagrees with manifest or receipt)."""
    path, temporary = _local_copy(join(dest, entry.name + ".tar"))
    try:
        index = read_index(path)
    except (tarfile.TarError, ValueError) as error:
        return 0, str(error)
    finally:
        if temporary:
            path.unlink(missing_ok=True)
    num_samples, rest = divmod(len(index), len(manifest.suffixes))
    if rest or num_samples != entry.num_samples:
        return num_samples, f"holds {len(index)} members, not {entry.num_samples} x {len(manifest.suffixes)}"
    if receipt is not None:
        flat = [(row[i], row[i + 1]) for row in receipt["offsets"] for i in range(0, len(row), 2)]
        if flat != [(offset, length) for _, offset, length in index]:
            return num_samples, "members lie elsewhere than the receipt says"
        first, last = receipt["first_index"], receipt["first_index"] + entry.num_samples + _num_gaps(receipt)
        keys = {name.split(".", 1)[0] for name, _, _ in index}
        if not keys <= {key(number) for number in range(first, last)}:
            return num_samples, "holds keys outside its plan"
    return num_samples, None


def _num_gaps(receipt: Receipt) -> int:
    return sum(reject["num_samples"] for reject in receipt["rejects"])


def _local_copy(url: str) -> tuple[Path, bool]:
    fs, path = filesystem(url)
    if is_local(url):
        return Path(path), False
    handle, name = tempfile.mkstemp(prefix="latentzoom-verify-")
    os.close(handle)
    with_retries(lambda: fs.get_file(path, name), f"reading {url}", ATTEMPTS, counter)
    return Path(name), True


def _check_plan(dest: str, manifest: Manifest) -> list[str]:
    facts = read_plan(dest)
    damage = []
    if facts is None or sha256_bytes(canonical_json(facts)) != manifest.plan:
        damage.append(f"{PLAN_NAME}: is missing, damaged or of another plan")
    try:
        listing = sha256_bytes(gzip.decompress(read_bytes(join(dest, LISTING_NAME))))
    except (UserError, OSError, EOFError, zlib.error):
        listing = ""
    if listing != manifest.source["listing_sha256"]:
        damage.append(f"{LISTING_NAME}: is missing or damaged")
    return damage


def _check_ledger(dest: str, manifest: Manifest, report: Report) -> list[str]:
    url = join(dest, LEDGER_NAME)
    if not exists(url):
        return [f"{LEDGER_NAME}: is missing"]
    data = read_bytes(url)
    if sha256_bytes(data) != manifest.ledger_sha256:
        return [f"{LEDGER_NAME}: checksum differs"]
    rejected = sum(json.loads(line)["num_samples"] for line in data.decode().splitlines())
    if rejected != manifest.num_rejected:
        return [f"{LEDGER_NAME}: counts {rejected} rejected samples, the manifest {manifest.num_rejected}"]
    if not report.damage and report.num_samples != manifest.num_samples:
        return [f"manifest.json: counts {manifest.num_samples} samples, the shards {report.num_samples}"]
    return []
