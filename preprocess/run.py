"""One preprocessing run from plan to manifest. Run again after any interruption, it continues and ends the same."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import absolute, exists, join, read_bytes, read_json, write_bytes
from preprocess.build import Built, ShardBuilder, StageSeconds
from preprocess.config import PreprocessConfig
from preprocess.encode import StoredEncoder, autoencoder_facts
from preprocess.finish import finish
from preprocess.plan import Plan, ShardPlan, listing_file, make_plan
from preprocess.publish import remove_scratch
from preprocess.receipt import Receipt, finished_receipts
from preprocess.rejects import check_ceiling
from preprocess.sources import open_source
from preprocess.sources.base import Source

PLAN_NAME = "plan.json"
LISTING_NAME = "sources.txt.gz"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did. in = out + rejected always holds. `limited_by`: "encoder", or what held the encoder back."""

    dest: str
    num_samples: int
    num_images: int
    num_shards: int
    num_shards_kept: int
    num_rejected: int
    num_rejected_images: int
    seconds: float
    samples_per_second: float
    encode_busy: float
    limited_by: str
    retries: int
    workers_lost: int
    scale_factor: float
    manifest_digest: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


def preprocess(
    config: PreprocessConfig, *, autoencoder: StoredEncoder | str | None = None, source: Source | None = None
) -> Summary:
    """Make (or complete) the shard set in `config.dest`.

    autoencoder: an encoder, or the URL of a bundle; None uses `config.autoencoder`, and pixels only without that.
    source: for programs with a source of their own; `config.source` is then only its name.
    Raises `UserError` for what a user can mend; whatever was finished stays.
    """
    start = time.monotonic()
    config = config.replace(dest=absolute(config.dest))
    encoder = load_encoder(autoencoder if autoencoder is not None else config.autoencoder)
    config = resolve(config)
    source = source or open_source(config)
    facts = autoencoder_facts(encoder, config.size) if encoder else None
    plan = make_plan(config, source, facts, library_versions(encoder is not None))
    accept_or_refuse(config, plan)
    remove_scratch(config.dest)
    _write_plan(config, plan)
    done, troubles = finished_receipts(config.dest, [s.name for s in plan.shards], plan.hash, config.recheck)
    for trouble in troubles:
        print(f"rebuilding: {trouble}", file=sys.stderr)
    todo = [shard for shard in plan.shards if shard.name not in done]
    builder = ShardBuilder(config, source, encoder, facts, plan.hash)
    tally = _build(config, plan, todo, dict(done), builder)
    manifest = finish(config, plan, facts, tally.receipts)
    seconds = time.monotonic() - start
    num_built = sum(tally.receipts[s.name]["num_samples"] for s in todo)
    return Summary(
        dest=config.dest,
        num_samples=manifest.num_samples,
        num_images=manifest.num_images,
        num_shards=len(plan.shards),
        num_shards_kept=len(done),
        num_rejected=manifest.num_rejected,
        num_rejected_images=manifest.num_rejected_images,
        seconds=round(seconds, 3),
        samples_per_second=round(num_built / max(seconds, 1e-9), 2),
        encode_busy=round(tally.encode_busy(), 4),
        limited_by=tally.limited_by(encoder is not None),
        retries=tally.seconds.retries,
        workers_lost=tally.workers_lost,
        scale_factor=manifest.scale_factor,
        manifest_digest=manifest.digest,
    )


def load_encoder(autoencoder: StoredEncoder | str | None) -> StoredEncoder | None:
    """The autoencoder of a bundle; anything else is returned as it is."""
    if not isinstance(autoencoder, str):
        return autoencoder
    from pipeline.bundle import load_bundle

    return load_bundle(autoencoder).autoencoder


def library_versions(has_encoder: bool) -> dict[str, str]:
    """Libraries whose version can move the bytes of a shard."""
    names = ["pillow", "numpy", *(["torch", "diffusers"] if has_encoder else [])]
    return {name: version(name) for name in names}


def resolve(config: PreprocessConfig) -> PreprocessConfig:
    """Fill in what was left open: from an earlier run of the same destination, or from this machine."""
    earlier = read_json(join(config.dest, PLAN_NAME)) if exists(join(config.dest, PLAN_NAME)) else {}
    cores = os.cpu_count() or 1
    threads = (earlier.get("encoder") or {}).get("threads") or min(4, cores)
    return config.replace(
        encode_threads=config.encode_threads or threads, decode_threads=config.decode_threads or cores
    )


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


def _write_plan(config: PreprocessConfig, plan: Plan) -> None:
    if not exists(join(config.dest, PLAN_NAME)):
        write_bytes(join(config.dest, LISTING_NAME), listing_file(plan))
        write_bytes(join(config.dest, PLAN_NAME), (json.dumps(plan.facts, indent=1, sort_keys=True) + "\n").encode())


class Tally:
    """What the builders have reported so far."""

    def __init__(self, receipts: dict[str, Receipt]) -> None:
        self.receipts = receipts
        self.by_builder: dict[str, StageSeconds] = {}
        self.workers_lost = 0

    @property
    def seconds(self) -> StageSeconds:
        total = StageSeconds()
        for seconds in self.by_builder.values():
            total = total.plus(seconds)
        return total

    def num_rejected_images(self) -> int:
        return len({r["image"] for receipt in self.receipts.values() for r in receipt["rejects"]})

    def encode_busy(self) -> float:
        seconds = self.seconds
        return seconds.encode / seconds.total if seconds.total > 0 else 0.0

    def limited_by(self, has_encoder: bool) -> str:
        """The encoder when it was busy nine tenths of the time, else the stage it waited for most."""
        seconds = self.seconds
        if seconds.total == 0:
            return "nothing to do"
        if has_encoder and self.encode_busy() >= 0.9:
            return "encoder"
        waits = {"reading and decoding": seconds.wait_decode, "writing and publishing": seconds.wait_publish}
        return max(waits, key=lambda name: waits[name])


def _build(
    config: PreprocessConfig, plan: Plan, todo: list[ShardPlan], receipts: dict[str, Receipt], builder: ShardBuilder
) -> Tally:
    tally = Tally(receipts)
    num_done = sum(shard.num_samples for shard in plan.shards) - sum(shard.num_samples for shard in todo)
    with Progress("preprocess", plan.num_samples, "images", initial=num_done) as progress:
        for name, built in _run_builders(config, todo, builder, tally):
            tally.by_builder[name] = built.seconds
            if built.receipt is not None:
                tally.receipts[built.receipt["name"]] = built.receipt
                if built.receipt["rejects"]:
                    check_ceiling(
                        tally.num_rejected_images(),
                        plan.num_images,
                        config.max_reject_fraction,
                        built.receipt["rejects"][-1],
                    )
            note = f"encoder busy {tally.encode_busy():.0%}" if builder.autoencoder else ""
            rejected = tally.num_rejected_images()
            progress.update(built.num_samples, note + (f"  rejected {rejected}" if rejected else ""))
    return tally


def _run_builders(
    config: PreprocessConfig, todo: list[ShardPlan], builder: ShardBuilder, tally: Tally
) -> Iterator[tuple[str, Built]]:
    for built in builder.build(todo):
        yield "in-line", built
