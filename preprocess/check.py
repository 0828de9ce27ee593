"""`latentzoom preprocess check SOURCE`: every image read and decoded once, and all that cannot be used listed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial

from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.storage import absolute
from preprocess.config import CheckConfig
from preprocess.crops import choose_box
from preprocess.images import decode, use_own_size_limit
from preprocess.plan import PlannedImage
from preprocess.reading import read_image
from preprocess.rejects import Reject
from preprocess.retry import RetryCounter
from preprocess.run import plan_run
from preprocess.sources import open_source
from preprocess.sources.base import Source
from preprocess.sources.listing import said

_FEW = 64
_CHUNK = 16


@dataclass(frozen=True)
class Finding:
    """An image that cannot be used. reason, detail: as in the ledger of a run."""

    image: str
    reason: str
    detail: str


@dataclass
class Report:
    """What a check found. Of num_images, `bad` cannot be used; left_out: files that are no images, by kind."""

    num_images: int
    num_samples: int
    splits: dict[str, int]
    left_out: dict[str, int]
    bad: list[Finding] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    def to_text(self) -> str:
        """A line for each bad image, then the sums."""
        lines = [f"{found.image}: {found.reason}: {found.detail}" for found in self.bad]
        reasons = said(Counter(found.reason for found in self.bad))
        splits = ", ".join(f"{split} {num}" for split, num in self.splits.items())
        lines.append(f"left out: {said(self.left_out) or 'nothing'}")
        good = self.num_images - len(self.bad)
        lines.append(f"{good} of {self.num_images} images can be used ({splits} samples planned)")
        if self.bad:
            lines.append(f"{len(self.bad)} cannot: {reasons}; mend or remove them, or preprocess with --policy skip")
        return "\n".join(lines)


def check(config: CheckConfig) -> Report:
    """Read and decode every image of the source once. Bad ones come in the report, sorted by name."""
    config = config.replace(source_url=absolute(config.source_url), samples_per_shard=1 << 30).with_crop()
    source = open_source(config)
    plan = plan_run(config, source, None)
    planned = [image for shard in plan.shards for image in shard.images]
    report = Report(plan.num_images, plan.num_samples, plan.facts["splits"], plan.left_out)
    with Progress("check", len(planned), "images") as progress, _mapped(config, source, planned) as findings:
        for found in findings:
            if found:
                report.bad.append(found)
            progress.update(1, f"bad {len(report.bad)}" if report.bad else "")
    report.bad.sort(key=lambda found: found.image)
    return report


@contextlib.contextmanager
def _mapped(config: CheckConfig, source: Source, planned: list[PlannedImage]) -> Iterator[Iterator[Finding | None]]:
    """Findings in order, by processes; a few images are not worth starting any."""
    num_processes = min(config.processes or os.cpu_count() or 1, max(1, len(planned) // _CHUNK))
    if len(planned) <= _FEW or num_processes == 1:
        use_own_size_limit()
        yield map(partial(_finding, config, source), planned)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _start, (config, source)) as pool:
        try:
            yield pool.map(_finding_here, planned, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise UserError("a process that decoded images died; free memory, or use --processes 1") from error
        finally:
            pool.shutdown(cancel_futures=True)


_here: list[tuple[CheckConfig, Source]] = []


def _start(config: CheckConfig, source: Source) -> None:
    use_own_size_limit()
    _here[:] = [(config, source)]


def _finding_here(planned: PlannedImage) -> Finding | None:
    return _finding(*_here[0], planned)


def _finding(config: CheckConfig, source: Source, planned: PlannedImage) -> Finding | None:
    image = planned.image
    try:
        data = read_image(source, image, config.retries, RetryCounter())
        if data and (trouble := source.check(image, data)):
            raise Reject("wrong_checksum", trouble)
        picture = decode(data, config.max_pixels)
        for crop in range(planned.num_crops):
            choose_box(config, image, crop, picture.height, picture.width)
    except Reject as reject:
        return Finding(image, reject.reason, reject.detail)
    return None
