"""What a run did: for programs (JSON) and for people."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field

from pipeline.progress import format_seconds
from preprocess.config import PreprocessConfig
from preprocess.finish import LEDGER_NAME
from preprocess.shards.manifest import Manifest
from preprocess.sources.listing import said
from preprocess.tally import Tally


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did. in = out + rejected always holds. `limited_by`: "encoder", or what held the encoder back.
    num_reused: samples that were there before this run. rejected: images by reason. left_out: files of the source that
    are no images of the set, by kind."""

    dest: str
    num_samples: int
    num_images: int
    num_shards: int
    num_shards_kept: int
    num_reused: int
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
    size: int = 0
    latent_shape: list[int] | None = None
    splits: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    def to_text(self) -> str:
        """A few lines for people."""
        splits = ", ".join(f"{split} {num}" for split, num in self.splits.items())
        latents = "x".join(map(str, self.latent_shape)) if self.latent_shape else "none (pixels only)"
        bad = said(self.rejected) + f" ({self.dest}/{LEDGER_NAME} names each)" if self.rejected else "nothing"
        limit = (
            f", limited by the {self.limited_by}" if self.limited_by == "encoder" else f", limited by {self.limited_by}"
        )
        retries = f", {self.retries} attempts repeated" if self.retries else ""
        lost = f", {self.workers_lost} worker{'s' * (self.workers_lost > 1)} lost" if self.workers_lost else ""
        lines = [
            f"samples:  {self.num_samples} of {self.size}x{self.size} from {self.num_images} images ({splits})",
            f"latents:  {latents}",
            f"rejected: {bad}",
            f"left out: {said(self.left_out) or 'nothing'}",
            f"reused:   {self.num_reused} samples, {self.num_shards_kept} of {self.num_shards} shards as they were",
            f"time:     {format_seconds(self.seconds)}, {self.samples_per_second:g} samples/s{limit}{retries}{lost}",
            f"written:  {self.dest}, manifest {self.manifest_digest[:12]}",
        ]
        return "\n".join(lines)


def summary_of(
    config: PreprocessConfig, manifest: Manifest, tally: Tally, *, num_shards_kept: int, num_built: int, seconds: float,
    retries: int, has_encoder: bool, num_reused: int | None = None, left_out: dict[str, int] | None = None,
) -> Summary:  # fmt: skip
    """num_built: samples that this run made, over `seconds`. left_out: this run's; by default the manifest's."""
    return Summary(
        dest=config.dest,
        num_samples=manifest.num_samples,
        num_images=manifest.num_images,
        num_shards=len(manifest.shards),
        num_shards_kept=num_shards_kept,
        num_reused=manifest.num_samples - num_built if num_reused is None else num_reused,
        num_rejected=manifest.num_rejected,
        num_rejected_images=manifest.num_rejected_images,
        seconds=round(seconds, 3),
        samples_per_second=round(num_built / max(seconds, 1e-9), 2),
        encode_busy=round(tally.encode_busy(), 4),
        limited_by=tally.limited_by(has_encoder),
        retries=retries,
        workers_lost=tally.workers_lost,
        scale_factor=manifest.scale_factor,
        manifest_digest=manifest.digest,
        size=manifest.size,
        latent_shape=manifest.latent_shape,
        splits=manifest.splits,
        rejected=dict(Counter(reject["reason"] for reject in tally.rejects.values())),
        left_out=manifest.left_out if left_out is None else left_out,
    )
