"""What one run of one stage was given: settings, data, parts from earlier stages, workers and sinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from pipeline import storage
from pipeline.autoencoder import Autoencoder
from pipeline.bundle import Bundle, build_autoencoder
from pipeline.config import ModelConfig, to_dict
from pipeline.errors import UserError, plain_without_secrets
from preprocess.loader import ShardLoader
from preprocess.manifest import Manifest
from training.config import HOW_ONLY, WATCHING, StageConfig, is_address, is_joint, model_settings
from training.migrations import Kept, in_todays_terms
from training.quality import MakeQuality
from training.reporter import BackgroundReporter, FolderReporter, NullReporter, Reporter
from training.starts import Origin, sources
from training.stopping import Stop
from training.world import World

# Settings that may change when a run is continued; every other one decides what is trained.
_FREE = {
    "steps",
    "micro_batch",
    "checkpoint_every",
    "keep",
    "log_every",
    "grid_every",
    "activation_checkpointing",
    "compile",
    "channels_last",
    "lr",
    "warmup_steps",
    "schedule",
    *HOW_ONLY,
    *WATCHING,
}


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything a stage needs to know. `reporters` are built on the main worker only, when training starts.
    part_digests: hash of the weights of each part of the bundle. origins: parts of the bundle that training starts
    from, and where they come from. as_begun: settings that a run of an earlier version keeps (`training.migrations`).
    profile: optimizer steps to watch (`training.profiling`). make_quality: the product's evaluation, for early figures
    of quality."""

    stage: str
    config: StageConfig
    model: ModelConfig
    data: str
    manifest: Manifest
    run_dir: str
    bundle: Bundle | None
    world: World
    use_deepspeed: bool
    reporters: list[Callable[[], Reporter]] = field(default_factory=list)
    stop_requested: Callable[[], Stop] = lambda: Stop.NO
    progress_stream: TextIO | None = None
    part_digests: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    as_begun: Kept = field(default_factory=dict)
    profile: int = 0
    make_quality: MakeQuality | None = None

    @property
    def checkpoint_url(self) -> str:
        return storage.join(self.run_dir, "checkpoints")

    def loader(
        self,
        *,
        pixels: bool,
        latents: bool,
        batch_size: int | None = None,
        split: str = "train",
        main_only: bool = False,
        shuffle: bool = True,
    ) -> ShardLoader:
        """This worker's batches. `main_only`: a separate small reader for pictures, not shared among workers."""
        identity = self.bundle.autoencoder.identity() if self.bundle is not None and latents else None
        return ShardLoader(
            self.data,
            split=split,
            batch_size=batch_size or self.config.global_batch // self.world.size,
            rank=0 if main_only else self.world.rank,
            world_size=1 if main_only else self.world.size,
            seed=self.config.seed,
            flip=self.config.flip and not main_only,
            lr_size=self._lr_sizes() if latents else 0,
            pixels=pixels,
            latents=latents,
            autoencoder_identity=identity,
            num_threads=1 if main_only else self.config.loader_threads,
            batches_ahead=1 if main_only else self.config.batches_ahead,
            shards_ahead=0 if main_only else self.config.shards_ahead,
            shuffle=shuffle,
        )

    def _lr_sizes(self) -> tuple[int, ...]:
        """Low-resolution sizes whose conditions the model is trained with."""
        if self.model.task == "direct":
            return tuple(self.manifest.lr_sizes)
        return (self.model.lr_size,) if self.model.task == "sr" else ()

    def open_reporter(self, resume_step: int) -> Reporter:
        """The run's sinks, on the main worker; a run without a main worker's duties reports nothing."""
        if not self.world.is_main:
            return NullReporter()
        reporter = BackgroundReporter([FolderReporter(self.run_dir, resume_step), *(make() for make in self.reporters)])
        settings = {"stage": self.stage, **to_dict(self.config), "model": to_dict(self.model), "data": self.data}
        started = self.started_from()
        reporter.params(plain_without_secrets({**settings, "started_from": started} if started else settings))
        return reporter

    def started_from(self) -> dict[str, dict[str, str]]:
        """Part that is trained → whose weights it began with: part, of, model, sha256. Empty for new weights."""
        return {part: {**o, "sha256": self.part_digests[o["part"]]} for part, o in self.origins.items()}

    def fingerprint(self) -> dict[str, Any]:
        """What must not change between two parts of one run. Of the model that is what the stage trains: the decoder
        may still be chosen while the autoencoder is being trained."""
        config = {name: value for name, value in to_dict(self.config).items() if name not in _FREE}
        for name in ("start", "decoder_start"):  # the weights themselves count, not where they lie
            config |= {name: "bundle"} if is_address(config.get(name, "")) else {}
        model = model_settings(self.stage, self.model, joint=is_joint(self.config))
        fixed = {"stage": self.stage, "model": model, "data": self.manifest.digest, "settings": config}
        # Alignment stage 2 and distillation render with the decoder; other stages see latents only.
        names: tuple[str, ...] = ("decoder", "denoiser") if self.stage in ("align", "distill") else ()
        names = names or sources(self.stage, self.config)  # of a stage that goes on from the bundle's weights
        is_drawn = self.model.task == "direct" and getattr(self.config, "conditions", "") == "drawn"
        if is_drawn and self.model.autoencoder.kind != "identity" and "autoencoder" not in names:
            names += ("autoencoder",)  # it encodes what a step draws
        used = [self.part_digests[name] for name in names if name in self.part_digests]
        return {**fixed, "bundle": storage.sha256_bytes(" ".join(used).encode())} if used else fixed

    def completed(self, stored: dict[str, Any]) -> dict[str, Any]:
        """A stored fingerprint in today's terms, with the settings that did not exist when it was written at their
        defaults: those of the stage and of the model's parts."""
        stored = in_todays_terms(self.stage, self.model, stored, self.checkpoint_url)
        defaults = to_dict(type(self.config)())
        settings = {**{k: defaults[k] for k in self.fingerprint()["settings"]}, **stored["settings"]}
        parts = {f.name: to_dict(getattr(self.model, f.name).__class__()) for f in _model_parts(self.model)}
        model = {k: {**parts[k], **v} if k in parts else v for k, v in stored.get("model", {}).items()}
        return {**stored, "settings": settings, "model": model}

    def difference(self, other: dict[str, Any]) -> str:
        """Which part of the fingerprint differs from a stored one, in words."""
        mine = self.fingerprint()
        changed = [name for name in mine if mine[name] != other.get(name)]
        if changed == ["settings"]:
            stored = other["settings"]
            fields = [f"{k} was {stored.get(k)!r}, is {v!r}" for k, v in mine["settings"].items() if stored.get(k) != v]
            return ", ".join(fields)
        return "different " + " and ".join(changed)


def _model_parts(model: ModelConfig) -> list[dataclasses.Field[Any]]:
    """Fields that are configurations of their own."""
    return [f for f in dataclasses.fields(model) if dataclasses.is_dataclass(getattr(model, f.name))]


def require_parts(bundle: Bundle | None, stage: str, *names: str) -> Bundle:
    """The bundle with the parts that a stage builds on; `UserError` naming the stage that makes a missing one."""
    made_by = {"autoencoder": "autoencoder", "decoder": "decoder", "denoiser": "denoiser"}
    for name in names:
        if bundle is None or getattr(bundle, name) is None:
            raise UserError(
                f"stage {stage} needs a bundle with the {name}; train stage {made_by[name]} first (--bundle)"
            )
    assert bundle is not None
    return bundle


def frozen_autoencoder(context: Context) -> Autoencoder:
    """The bundle's autoencoder; the kind "identity", which has no weights, needs no bundle."""
    if context.bundle is None and context.model.autoencoder.kind == "identity":
        return build_autoencoder(context.model)
    return require_parts(context.bundle, "decoder", "autoencoder").autoencoder.eval().requires_grad_(False)
