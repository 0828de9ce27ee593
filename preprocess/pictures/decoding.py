"""Images read, decoded and cropped ahead of the encoder, in threads, in plan order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.storage import sha256_bytes
from preprocess.config import PreprocessConfig
from preprocess.pictures.crops import choose_box
from preprocess.pictures.images import crop_and_resize, decode, encode_pixels
from preprocess.pictures.reading import read_image
from preprocess.plan import PlannedImage, ShardPlan
from preprocess.rejects import Reject
from preprocess.retry import RetryCounter
from preprocess.shards.sample import sample_id
from preprocess.sources.base import Source


@dataclass(slots=True)
class Crop:
    """One sample before encoding. array: uint8 (H,W,3); pixels: the same as it will be stored."""

    info: dict[str, Any]
    array: np.ndarray
    pixels: bytes


@dataclass(slots=True)
class DecodedImage:
    """The crops of one planned image, or why there are none. `data` is kept only for the quarantine."""

    planned: PlannedImage
    crops: list[Crop] = field(default_factory=list)
    reject: Reject | None = None
    data: bytes = b""
    was_read: bool = True


def decode_image(
    planned: PlannedImage, source: Source, config: PreprocessConfig, has_flips: bool, counter: RetryCounter
) -> DecodedImage:
    """Read one image and cut its crops. A bad image gives a `reject`; a store that stays broken raises."""
    image, data, was_read = planned.image, b"", False
    try:
        data = read_image(source, image, config.retries, counter)
        was_read = True
        trouble = source.check(image, data) if data else None
        if trouble:
            raise Reject("wrong_checksum", trouble)
        return DecodedImage(planned, _crops(planned, data, source, config, has_flips))
    except Reject as reject:
        return DecodedImage(planned, reject=reject, data=data, was_read=was_read)


def _crops(planned: PlannedImage, data: bytes, source: Source, config: PreprocessConfig, has_flips: bool) -> list[Crop]:
    picture = decode(data, config.max_pixels)
    height, width = picture.height, picture.width
    shared = {
        "image": planned.image,
        "sha256": sha256_bytes(data),
        "source_size": [height, width],
        "flip": has_flips,
        **source.info(planned.image),
    }
    crops = []
    for number in range(planned.first_crop, planned.first_crop + planned.num_crops):
        box = choose_box(config, planned.image, number, height, width)
        small = crop_and_resize(picture, box, config.size, config.resize)
        info = {"id": sample_id(planned.image, number, config.is_numbered), "crop": number, "box": list(box), **shared}
        stored = data if config.source == "shards" else encode_pixels(small, config.pixel_format)
        crops.append(Crop(info, np.asarray(small), stored))
    return crops


def decode_ahead(
    shards: Iterable[ShardPlan], source: Source, config: PreprocessConfig, has_flips: bool, counter: RetryCounter
) -> Generator[tuple[ShardPlan, DecodedImage | None], None, None]:
    """(shard, image) in plan order, and (shard, None) after the last image of a shard.

    About three encode batches are in flight, across shard borders, so that the encoder finds its next batch ready.
    Close it when leaving early: its threads must not be joined by whichever thread collects garbage.
    """
    limit = 3 * config.batch_size + 2 * config.decode_threads
    in_flight: deque[tuple[ShardPlan, Future[DecodedImage] | None, int]] = deque()
    num_ahead = 0
    pool = ThreadPoolExecutor(max_workers=config.decode_threads, thread_name_prefix="decode")
    try:
        for shard in shards:
            for planned in shard.images:
                future = pool.submit(decode_image, planned, source, config, has_flips, counter)
                in_flight.append((shard, future, planned.num_crops))
                num_ahead += planned.num_crops
                while num_ahead > limit and len(in_flight) > 1:
                    ready, future_or_end, num = in_flight.popleft()
                    num_ahead -= num
                    yield ready, future_or_end.result() if future_or_end else None
            in_flight.append((shard, None, 0))
        while in_flight:
            ready, future_or_end, _ = in_flight.popleft()
            yield ready, future_or_end.result() if future_or_end else None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
