"""What one run of one stage was given: settings, data, parts from earlier stages, workers and sinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline import storage
from pipeline.autoencoder import Autoencoder
from pipeline.bundle import Bundle, build_autoencoder
from pipeline.config import ModelConfig, to_dict
from pipeline.errors import UserError, without_secrets
from pipeline.redact import plain_without_secrets
from preprocess.shards.loader import ShardLoader
from preprocess.shards.manifest import Manifest
from training.config import StageConfig
from training.identity import Identity
from training.migrations import Kept
from training.reporter import BackgroundReporter, FolderReporter, NullReporter, Reporter
from training.request import TrainRequest
from training.starts import Origin
from training.world import World

_BUILDS_ON = {
    "decoder": ("autoencoder",),
    "denoiser": ("autoencoder",),
    "align": ("autoencoder", "decoder", "denoiser"),
    "distill": ("autoencoder", "decoder", "denoiser"),
}
"""Stage → parts of the incoming bundle that it cannot do without."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """Everything a stage needs to know: what was asked for, and what became of it.

    config, model: the stage's settings and the model as this run has them. data, run_dir: absolute. bundle: what the
    stage builds on and starts from. part_hashes: of the weights of each part of the bundle. origins: parts of the
    bundle that training starts from, and where they come from. as_begun: settings that a run of an earlier version
    keeps (`training.migrations`)."""

    request: TrainRequest
    config: StageConfig
    model: ModelConfig
    data: str
    manifest: Manifest
    run_dir: str
    bundle: Bundle | None
    world: World
    part_hashes: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    as_begun: Kept = field(default_factory=dict)

    @property
    def stage(self) -> str:
        return self.request.stage

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
        further = [make() for make in self.request.reporters]
        reporter = BackgroundReporter([FolderReporter(self.run_dir, resume_step), *further])
        settings = {"stage": self.stage, **to_dict(self.config), "model": to_dict(self.model), "data": self.data}
        started = self.started_from()
        settings |= {"started_from": started} if started else {}
        reporter.params(plain_without_secrets(settings, without_secrets))
        return reporter

    def started_from(self) -> dict[str, dict[str, str]]:
        """Part that is trained → whose weights it began with: part, of, model, sha256. Empty for new weights."""
        return {part: {**o, "sha256": self.part_hashes[o["part"]]} for part, o in self.origins.items()}

    @property
    def identity(self) -> Identity:
        """What makes this run the same as another."""
        return Identity(
            stage=self.stage,
            settings=self.config,
            model=self.model,
            data=self.manifest.digest,
            parts=self.part_hashes,
        )


def require_parts(bundle: Bundle | None, stage: str) -> Bundle:
    """The bundle with the parts that a stage builds on, each called as the stage that makes it; `UserError` naming one
    that is missing."""
    for name in _BUILDS_ON[stage]:
        if bundle is None or getattr(bundle, name) is None:
            raise UserError(f"stage {stage} needs a bundle with the {name}; train stage {name} first (--bundle)")
    assert bundle is not None
    return bundle


def frozen_autoencoder(context: Context) -> Autoencoder:
    """The bundle's autoencoder; the kind "identity", which has no weights, needs no bundle."""
    if context.bundle is None and context.model.autoencoder.kind == "identity":
        return build_autoencoder(context.model)
    return require_parts(context.bundle, "decoder").autoencoder.eval().requires_grad_(False)
