"""The whole chain of one model as resumable steps: each calls what its own verb calls.

    pixels → autoencoder → latents → decoder → denoiser → align → evaluate → register → promote
    (with a bundle that holds an autoencoder:  latents → decoder → ...)
    (a first stage trained with the implicit decoder:  autoencoder → latents → denoiser → ...)
    (direct super-resolution:  pixels → decoder → evaluate → ...)
    (one-step super-resolution:  ... → align → distill → evaluate, beside the teacher → ...)

Every step writes to a folder named after its key, WORKDIR/NAME/KEY: changed settings never meet old results, and a
step that was killed finds its own checkpoint again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from orchestration.chain.steps import Result, Step, step_keys
from orchestration.chain.work import evaluate_step, promote_step, register_step, shards_step, train_step
from orchestration.cluster.elastic import idle_workers
from orchestration.registry.starts import place, places
from pipeline import storage
from pipeline.config import to_dict
from pipeline.errors import UserError
from pipeline.redact import plain_without_secrets
from pipeline.starter import starter_or
from preprocess.config import PreprocessConfig
from preprocess.sources import open_source
from training.config import Preset, is_address
from training.evaluation.report import PROTOCOL_VERSION
from training.evaluation.spec import EvaluationSpec, spec_to_dict
from training.identity import step_settings
from training.rehearsal import rehearse
from training.starts import given_starts

_NOT_IN_KEY = (
    "dest",
    "autoencoder",
    "policy",
    "max_reject_fraction",
    "max_rejects",
    "workers",
    "gpus_per_worker",
    "cpus_per_worker",
    "ray_address",
    "decode_threads",
    "recheck",
    "retries",
    "plan",
    "json",
    "update",
    "sizes",
)
"""Fields of a preprocessing run that do not decide its bytes (`encode_threads` and `device` do)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One pipeline. preprocess: source and crops; `dest` and `autoencoder` are set by the chain. autoencoder: bundle
    that stage 0 is replaced by. stages: those to train, all of the preset's when empty. redo: how often `--from` asked
    for a step anew. local: no Ray, no DeepSpeed."""

    work: str
    model_name: str
    preset: Preset
    preprocess: PreprocessConfig
    evaluation: EvaluationSpec
    tracking_uri: str
    autoencoder: str = ""
    stages: tuple[str, ...] = ()
    local: bool = False
    workers: int | tuple[int, int] = 1
    gpus_per_worker: float | None = None
    evaluate_workers: int = 0
    device: str = "cpu"
    redo: Mapping[str, int] = field(default_factory=dict)


class Chain:
    """The steps of a job, and where each keeps its results. still_ours: raises when another job took its folder;
    whoever holds the folder sets it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.still_ours: Callable[[], None] = lambda: None
        self.steps = _steps(self, job)
        self.keys = step_keys(self.steps)

    def names(self) -> list[str]:
        return [step.name for step in self.steps]

    def folder(self, name: str) -> str:
        """Where the results of a step lie."""
        return storage.join(self.job.work, name, self.keys[name][:16])

    def until(self, name: str) -> list[Step]:
        """The steps up to and with `name`; all for an empty name."""
        self.require(name)
        return self.steps[: self.names().index(name) + 1] if name else self.steps

    def require(self, name: str) -> None:
        if name and name not in self.names():
            raise UserError(f"this pipeline has no step {name!r}; it has {', '.join(self.names())}")


def _steps(chain: Chain, job: Job) -> list[Step]:
    source = _source_settings(job.preprocess)
    steps: list[Step] = []

    def add(name: str, settings: dict[str, Any], run: Any, *after: str) -> None:
        settings = plain_without_secrets(settings)
        if job.redo.get(name):
            settings = {**settings, "times asked for anew": job.redo[name]}
        steps.append(Step(name=name, settings=settings, run=run, after=after))

    def stage(name: str) -> dict[str, Any]:
        # Bundles on the way hold the model as it was then; every later stage writes the preset's, and align's key has
        # all of it: the last bundle is always the newest model.
        found = step_settings(name, job.preset.stage(name), job.preset.model)
        starts = given_starts(name, job.preset.stage(name)).items()
        weights = {part: _start_digest(job, start) for part, start in starts if is_address(start)}
        return {**found, "starts": weights} if weights else found

    stages = _stages(job)
    data = "latents" if job.preset.uses_latents else "pixels"
    bundle: Address = lambda done: job.autoencoder or None  # noqa: E731
    before = ""
    if not job.autoencoder or data == "pixels":
        add("pixels", source, lambda done: shards_step(chain, "pixels", None))
        before = "pixels"
    if stages[0] == "autoencoder":
        add(
            "autoencoder", stage("autoencoder"), lambda done: train_step(chain, "autoencoder", "pixels", None), "pixels"
        )
        bundle, before = (lambda done: done["autoencoder"]["bundle"]), "autoencoder"
    if data == "latents":
        given = {**source, "autoencoder": _bundle_digest(job.autoencoder)} if job.autoencoder else {"again": True}
        after = () if job.autoencoder else ("pixels", "autoencoder")
        add("latents", given, partial(_encode, chain, bundle), *after)
        before = "latents"
    for name in stages:
        if name != "autoencoder":
            add(name, stage(name), partial(_later_stage, chain, name, data, bundle), before)
            bundle, before = partial(_bundle_of, name), name
    add(
        "evaluate",
        {**spec_to_dict(dataclasses.replace(job.evaluation, batch_size=1)), "protocol_version": PROTOCOL_VERSION},
        lambda done: evaluate_step(chain, done, before, data, stages),
        before,
    )
    target = {"model_name": job.model_name, "tracking_uri": job.tracking_uri}
    add("register", target, lambda done: register_step(chain, done, before, data), "evaluate")
    add("promote", {}, lambda done: promote_step(chain, done), "register")
    return steps


def _stages(job: Job) -> list[str]:
    """The stages to train, in order. `UserError` for one that the preset has not, or whose beginning is missing."""
    known = [name for name in job.preset.stages if name != "autoencoder" or not job.autoencoder]
    if unknown := [name for name in job.stages if name not in known]:
        raise UserError(f"--stages: there is no stage {unknown[0]!r} to train here; there are {', '.join(known)}")
    chosen = [name for name in known if not job.stages or name in job.stages]
    if "autoencoder" in known and "autoencoder" not in chosen:
        raise UserError("--stages leaves the autoencoder out; give a bundle that has one, with --init or --autoencoder")
    return chosen


def rehearse_stages(job: Job, steps: Collection[Step]) -> None:
    """`UserError` where one of the stages among the steps could not begin, as far as settings, bundles and this machine
    tell; a warning for workers that a stage leaves idle."""
    names = {step.name for step in steps}
    stages = [name for name in _stages(job) if name in names]
    if not job.local:
        least, most = (job.workers, job.workers) if isinstance(job.workers, int) else job.workers
        for name in stages:
            if idle := idle_workers(name, job.preset.stage(name), least, most):
                print(f"latentzoom: warning: {idle}", file=sys.stderr, flush=True)
    _check_encoder(job, names)
    found: dict[str, str] = {}
    for name in stages:
        found |= places(job.preset, name, job.work, job.tracking_uri, local=True)
    rehearse(job.preset, stages, job.autoencoder or None, found)


def _check_encoder(job: Job, names: Collection[str]) -> None:
    """`UserError` where latents would be encoded on a GPU in this process, which has none: hours before they are."""
    config = job.preprocess
    if "latents" in names and config.device.startswith("cuda") and not config.workers:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"latents would be encoded on {config.device} in this process, which has no CUDA device; give "
                "--preprocess-workers, or --preprocess device=cpu"
            )


def _start_digest(job: Job, start: str) -> str:
    return _bundle_digest(starter_or(place(start, job.work, job.tracking_uri, local=True)))


Address = Callable[[dict[str, Result]], str | None]
"""Results so far → URL of the bundle that a step starts from."""


def _bundle_of(name: str, done: dict[str, Result]) -> str:
    return str(done[name]["bundle"])


def _encode(chain: Chain, bundle: Address, done: dict[str, Result]) -> Result:
    return shards_step(chain, "latents", bundle(done))


def _later_stage(chain: Chain, name: str, data: str, bundle: Address, done: dict[str, Result]) -> Result:
    return train_step(chain, name, data, bundle(done))


def _source_settings(config: PreprocessConfig) -> dict[str, Any]:
    """What decides the shards: the settings, and the list of images with their sizes."""
    listed = sorted(open_source(config).list_images())
    if not listed:
        raise UserError(f"{config.source_url} has no images that --source {config.source} reads")
    listing = "".join(f"{image}\t{size}\n" for image, size in listed)
    settings = {k: v for k, v in to_dict(config.with_crop()).items() if k not in _NOT_IN_KEY}
    if not config.members:  # chains from before there was a choice keep their keys
        del settings["members"]
    return {"images": len(listed), "listing": storage.sha256_bytes(listing.encode()), **settings}


def _bundle_digest(url: str) -> str:
    config = storage.join(url, "config.json")
    if not storage.exists(config):
        raise UserError(f"no bundle at {url}: it has no config.json; make one with `latentzoom import` or train one")
    return storage.sha256_bytes(storage.read_bytes(config))
