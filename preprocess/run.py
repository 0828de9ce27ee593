"""One preprocessing run from plan to manifest. Run again after any interruption, it continues and ends the same."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Generator
from importlib.metadata import version
from typing import Any

from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import absolute, filesystem, is_local, join, reaching
from preprocess import store
from preprocess.build import Built, ShardBuilder
from preprocess.config import PreprocessConfig
from preprocess.encode import StoredEncoder, autoencoder_facts
from preprocess.finish import LEDGER_NAME, finish, ledger
from preprocess.growth import Carrier, base_manifest, grown, keep_manifest, require_same_kind
from preprocess.plan import Plan, ShardPlan, make_plan
from preprocess.plan_report import Expected, expected, probe, samples_per_shard
from preprocess.publish import remove_scratch, sole_run
from preprocess.quarantine import fill
from preprocess.receipt import Receipt, finished_receipts
from preprocess.resume import accept_or_refuse, read_plan, write_plan
from preprocess.retry import full_disk_explained, with_retries
from preprocess.sources import open_source
from preprocess.sources.base import Source
from preprocess.store import exists, read_json
from preprocess.summary import Summary, summary_of
from preprocess.tally import Observer, Tally

_OBSERVE_S = 5.0


def preprocess(
    config: PreprocessConfig,
    *,
    autoencoder: StoredEncoder | str | None = None,
    source: Source | None = None,
    observe: Observer | None = None,
) -> Summary:
    """Make (or complete) the shard set in `config.dest`.

    autoencoder: an encoder, or the URL of a bundle; None uses `config.autoencoder`, and pixels only without that.
    source: for programs with a source of their own; `config.source` is then only its name.
    observe: told how it goes every few seconds, and at the end; see `Observer`.
    Raises `UserError` for what a user can mend; whatever was finished stays.
    """
    config = with_places(config)
    with full_disk_explained(config.dest):
        return _preprocess(config, autoencoder, source, observe or (lambda figures: None))


def with_places(config: PreprocessConfig) -> PreprocessConfig:
    """The same with absolute places."""
    if config.sizes:
        raise UserError("--sizes asks for several runs; give each of `config.each_size()`, or --size alone")
    config = config.replace(dest=absolute(config.dest), source_url=absolute(config.source_url))
    if not is_local(config.dest) and not filesystem(config.dest)[1].strip("/"):
        raise UserError(f"the destination {config.dest} names no bucket; use s3://BUCKET/FOLDER")
    if config.dest.rstrip("/") == config.source_url.rstrip("/"):
        raise UserError(f"the destination {config.dest} is the source itself; choose another folder for the shards")
    return config


def _preprocess(
    config: PreprocessConfig, autoencoder: StoredEncoder | str | None, source: Source | None, observe: Observer
) -> Summary:
    start, retries_before = time.monotonic(), store.counter.count
    encoder = load_encoder(autoencoder if autoencoder is not None else config.autoencoder)
    config, source = resolve(config, source, encoder)
    facts = autoencoder_facts(encoder, config.size) if encoder else None
    plan = plan_run(config, source, facts)
    with sole_run(config.dest):
        base = base_manifest(config.dest) if config.update else None
        growth = None
        if base is not None and base.plan != plan.hash:
            require_same_kind(config, base, facts)
            growth = grown(config, source, plan, base)
            plan = growth.plan
        else:
            accept_or_refuse(config, plan)
        remove_scratch(config.dest)
        if growth is None:
            write_plan(config, plan)
        kept = growth.kept if growth else {}
        plans = {shard.name: plan.hash for shard in plan.shards if shard.name not in kept}
        done, troubles = finished_receipts(config.dest, plans, config.recheck)
        done.update(kept)
        for trouble in troubles:
            print(f"rebuilding: {trouble}", file=sys.stderr)
        todo = [shard for shard in plan.shards if shard.name not in done]
        if config.policy == "quarantine":
            fill(config, source, [r["image"] for receipt in done.values() for r in receipt["rejects"]], store.counter)
        carrier = Carrier(config.dest, growth.base) if growth else None
        builder = ShardBuilder(config, source, encoder, facts, plan.hash, carrier=carrier)
        tally = _build(config, plan, todo, dict(done), builder, observe)
        remove_scratch(config.dest)  # what workers left that died in this run
        if growth and growth.changes_nothing:
            manifest = growth.base
        else:
            if growth:
                keep_manifest(config.dest, growth.base)
                write_plan(config, plan)
            manifest = finish(config, plan, facts, tally.receipts)
    seconds = time.monotonic() - start
    num_built = sum(tally.receipts[s.name]["num_samples"] for s in todo if not s.copies)
    return summary_of(
        config,
        manifest,
        tally,
        num_shards_kept=len(done),
        num_built=num_built,
        seconds=seconds,
        retries=tally.seconds.retries + store.counter.count - retries_before,
        has_encoder=encoder is not None,
        left_out=plan.left_out,
    )


def load_encoder(autoencoder: StoredEncoder | str | None) -> StoredEncoder | None:
    """The autoencoder of a bundle or a diffusers folder (URL); an encoder is returned as it is."""
    if not isinstance(autoencoder, str):
        return autoencoder
    from pipeline.bundle import load_bundle
    from pipeline.importing.diffusers_folder import import_diffusers

    config_url = join(autoencoder, "config.json")
    is_bundle = exists(config_url) and "format" in read_json(config_url)
    is_diffusers = not is_bundle and (exists(config_url) or exists(join(autoencoder, "model_index.json")))
    return (import_diffusers(autoencoder) if is_diffusers else load_bundle(autoencoder)).autoencoder


def library_versions(has_encoder: bool) -> dict[str, str]:
    """Libraries whose version can move the bytes of a shard."""
    names = ["pillow", "numpy", *(["torch", "diffusers"] if has_encoder else [])]
    return {name: version(name) for name in names}


def resolve(
    config: PreprocessConfig, source: Source | None, encoder: StoredEncoder | None
) -> tuple[PreprocessConfig, Source]:
    """Fill in what was left open: from an earlier run of the same destination, or from this machine and a probe."""
    earlier = read_plan(config.dest) or {}
    cores = os.cpu_count() or 1
    threads = (earlier.get("encoder") or {}).get("threads") or min(4, cores)
    decode_threads = config.decode_threads or max(1, cores // max(1, config.workers))
    config = config.with_crop().replace(encode_threads=config.encode_threads or threads, decode_threads=decode_threads)
    source = source or open_source(config)
    if config.shard_bytes:
        shards = earlier.get("shards", {})
        if shards.get("shard_bytes") == config.shard_bytes:
            per_shard = shards["samples_per_shard"]
        else:
            listed = with_retries(source.list_images, f"listing {config.source_url}", config.retries, store.counter)
            images = sorted(image for image, _ in listed)
            per_shard = samples_per_shard(config, probe(config, source, encoder, images))
        config = config.replace(samples_per_shard=per_shard)
    return config, source


def plan_run(config: PreprocessConfig, source: Source, facts: dict[str, Any] | None) -> Plan:
    """The plan; listing the source is tried again when its store fails for a passing reason."""
    versions = library_versions(facts is not None)
    what = f"listing {config.source_url}"

    def planned() -> Plan:
        with reaching(config.source_url):
            return make_plan(config, source, facts, versions)

    return with_retries(planned, what, config.retries, store.counter)


def planned(config: PreprocessConfig) -> Expected:
    """What a run would do, from the plan and a short probe. Writes nothing."""
    config = with_places(config)
    encoder = load_encoder(config.autoencoder)
    config, source = resolve(config, None, encoder)
    facts = autoencoder_facts(encoder, config.size) if encoder else None
    plan = plan_run(config, source, facts)
    images = sorted({planned.image for shard in plan.shards for planned in shard.images})
    return expected(config, plan, probe(config, source, encoder, images))


def check_rejects(config: PreprocessConfig, plan: Plan, tally: Tally) -> None:
    """Stop when too many images are rejected, in this run or an earlier one; with policy "fail" one is too many.
    The ledger of the shards finished so far is written first."""
    allowed = config.max_rejected(plan.num_images)
    if len(tally.rejects) > allowed:
        url = join(config.dest, LEDGER_NAME)
        store.write_bytes(url, ledger([tally.receipts[s.name] for s in plan.shards if s.name in tally.receipts])[0])
        last = list(tally.rejects.values())[-1]
        raise UserError(
            f"{len(tally.rejects)} of {plan.num_images} images rejected, more than the {allowed} that --max-rejects "
            f"{config.max_rejects} and --max-reject-fraction {config.max_reject_fraction:g} allow "
            f"(policy {config.policy}); the last: {last['image']} ({last['reason']} {last['detail']}); "
            f"{url} names them all; look at the source, or allow more"
        )


def _build(
    config: PreprocessConfig,
    plan: Plan,
    todo: list[ShardPlan],
    receipts: dict[str, Receipt],
    builder: ShardBuilder,
    observe: Observer,
) -> Tally:
    tally = Tally(receipts)
    started = told = time.monotonic()
    num_built = 0
    check_rejects(config, plan, tally)
    num_kept = sum(shard.num_samples for shard in plan.shards) - sum(shard.num_samples for shard in todo)
    with (
        Progress("preprocess", plan.num_samples, "images", initial=num_kept) as progress,
        contextlib.closing(_run_builders(config, todo, builder, tally)) as news,
    ):
        for name, built in news:
            tally.by_builder[name] = built.seconds
            num_done = built.num_samples
            num_built += num_done
            if time.monotonic() - told >= _OBSERVE_S:
                told = time.monotonic()
                observe(tally.figures(num_built / (told - started)))
            if built.receipt is not None:
                num_done += sum(reject["num_samples"] for reject in built.receipt["rejects"])
                tally.add(built.receipt)
                check_rejects(config, plan, tally)
            note = f"encoder busy {tally.encode_busy():.0%}" if builder.autoencoder else ""
            rejected = len(tally.rejects)
            progress.update(num_done, note + (f"  rejected {rejected}" if rejected else ""))
    observe(tally.figures(num_built / max(time.monotonic() - started, 1e-9)))
    return tally


def _run_builders(
    config: PreprocessConfig, todo: list[ShardPlan], builder: ShardBuilder, tally: Tally
) -> Generator[tuple[str, Built], None, None]:
    if not config.workers or not todo:
        with contextlib.closing(builder.build(todo)) as news:
            for built in news:
                yield "in-line", built
        return
    from preprocess.workers import WorkerPool, ray_session

    with ray_session(config):
        pool = WorkerPool(config, builder, todo)
        for name, built in pool.run():
            tally.workers_lost = pool.num_lost
            yield name, built
