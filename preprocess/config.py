"""What one preprocessing run is asked to do. Sizes are pixels; fractions are of an image's short side."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import tyro

from pipeline.command_line import Flag, plain_help
from pipeline.errors import MANY, SEEDS, UserError, require_range
from pipeline.sizes import MAX_SIDE

LARGEST_SAMPLE = 1 << 14
MOST_THREADS, MOST_WORKERS = 4096, 100_000
FULL_RESOLUTION_SOURCES = ("div2k", "flickr2k", "df2k")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        flag = name if name.isupper() else "--" + name.replace("_", "-")
        raise UserError(f"{flag} = {value!r} is not allowed; use {allowed}")


@plain_help
@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """One run: a source, a destination, and how images become samples.

    The fields up to `seed` decide the bytes of the shards and are part of the plan's hash; the rest decide only how
    fast, where and how strictly the work is done.
    """

    source: Annotated[str, tyro.conf.Suppress] = "folder"
    """Kind of source: a name of `preprocess.sources.SOURCES`."""
    source_url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Where the images are: a folder, archive or database (any fsspec URL)."""
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """Folder for the shards (any fsspec URL)."""

    autoencoder: str | None = None
    """Bundle (or diffusers folder) whose autoencoder makes the latents; without it shards hold pixels only."""
    size: int = 256
    """Height and width of a sample."""
    crop: Literal["auto", "center", "random", "grid"] = "auto"
    """center: the middle square; random: seeded squares; grid: a regular tiling; auto: random for several crops per
    image and for DIV2K and Flickr2K, else center."""
    crops_per_image: int = 1
    """Seeded crops per image (random only)."""
    crop_fraction: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest side of a square crop, as a fraction of the short side."""
    crop_pixels: int = 0
    """Side of a crop in source pixels; 0: by --crop-fraction (grid, DIV2K and Flickr2K: --size)."""
    resize: Literal["bicubic", "lanczos", "box"] = "bicubic"
    """Anti-aliased filter that brings a crop to --size."""
    pixel_format: Literal["png", "webp", "jpg"] = "png"
    """How target pixels are stored; png and webp are lossless."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of stored latents."""
    flips: bool = True
    """Also encode the mirrored image (only with an autoencoder)."""
    lr_sizes: tuple[int, ...] = ()
    """Input sizes whose super-resolution condition latents are cached."""
    condition_resize: Literal["nearest", "bicubic"] = "bicubic"
    """How a low-resolution image is enlarged before it is encoded."""
    condition_cells: Literal["image", "input"] = "image"
    """Latent cells of a condition. image: as many as the picture's own latent has (super-resolution by diffusion);
    input: one for each low-resolution pixel (direct super-resolution)."""
    split: str = ""
    """Split of the source: ffhq official|ldm, lsun train|val, div2k; empty: the source's own default."""
    check_md5: bool = True
    """Compare FFHQ images with the MD5 sums in its JSON; switch off for a resized copy."""
    val_fraction: float = 0.0
    """Fraction of the images held out as split "val", drawn by a seeded hash of the id."""
    val_folder: str = ""
    """Images in this sub-folder of the source are the split "val"."""
    train_list: str = ""
    """Text file (URL) of ids or file names for "train"; ids in neither list are left out."""
    val_list: str = ""
    """Text file (URL) of ids or file names for "val"."""
    members: Annotated[tuple[str, ...], tyro.conf.arg(metavar="EXTENSION,...")] = ()
    """Take only images with these extensions (jpg, or input.png); empty: all but masks that lie beside their image."""
    limit: int = 0
    """Use only the first images of the shuffled list; 0: all."""
    samples_per_shard: int = 1024
    """Samples in one shard."""
    shard_bytes: int = 0
    """Bytes of one shard, about; when given it decides --samples-per-shard after a short probe."""
    batch_size: int = 16
    """Images encoded at once. Part of the plan: it moves the last bits of a latent."""
    encode_threads: int = 0
    """CPU threads of the encoder; 0: up to 4. Part of the plan: it moves the last bits of a latent."""
    device: str = "cpu"
    """Where the encoder runs: cpu, cuda, cuda:1."""
    max_pixels: int = 178_000_000
    """Larger images are rejected from their header, before decoding."""
    seed: int = 0
    """Seed of shuffle, splits and crops."""

    policy: Literal["fail", "skip", "quarantine"] = "fail"
    """What a bad image does: stop the run, be left out, or be left out and copied to DEST/quarantine."""
    max_reject_fraction: float = 0.001
    """The run stops when more than this fraction of the images is rejected, and more than --max-rejects."""
    max_rejects: int = 10
    """So many images may be rejected whatever their fraction, as long as half of the images are good."""
    workers: int = 0
    """Ray actors that build shards; 0: this process."""
    gpus_per_worker: float = 0.0
    """GPUs of one actor."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for one actor."""
    ray_address: str = ""
    """Ray cluster; empty: a local one, or the one this job runs in."""
    decode_threads: int = 0
    """Threads that read, decode and crop; 0: the number of cores."""
    recheck: Literal["hash", "size"] = "hash"
    """How shards of an earlier run are checked before they are kept."""
    retries: int = 6
    """Attempts for a read or write that fails for a passing reason."""
    update: bool = False
    """Bring a finished set up to date: encode what is new or changed in the source, drop what is gone, keep the
    rest."""
    sizes: tuple[int, ...] = ()
    """Several sizes in one run, instead of --size: a set of its own for each, in DEST/SIZE."""
    plan: Annotated[Flag, tyro.conf.arg(name="dry-run")] = False
    """Print samples, bytes, time and the bottleneck, from a short probe, and write nothing."""
    json: Annotated[bool, tyro.conf.Suppress] = False
    """Without effect: an option of every verb."""

    def __post_init__(self) -> None:
        low, high = self.crop_fraction
        _require(
            ".tar::" not in self.source_url, "SOURCE", self.source_url,
            "braces (shards-{000000..000099}.tar) or a folder for several tars",
        )  # fmt: skip
        require_range(self, 8, LARGEST_SAMPLE, "size", "sizes")
        _require(0 < low <= high <= 1, "crop_fraction", self.crop_fraction, "0 < smallest <= largest <= 1")
        require_range(self, 1, 1_000_000, "crops_per_image")
        _require(
            self.crop in ("auto", "random") or self.crops_per_image == 1,
            "crops_per_image",
            self.crops_per_image,
            "--crop random with more than one crop per image",
        )
        require_range(self, 0, MAX_SIDE, "crop_pixels")
        _require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "0 <= fraction < 1")
        require_range(self, 1, MANY, "samples_per_shard", "batch_size")
        require_range(self, 0, MANY, "limit", "max_rejects")
        require_range(self, 0, 1 << 50, "shard_bytes")
        require_range(self, 1, 1 << 50, "max_pixels")
        require_range(self, 0, MOST_WORKERS, "workers")
        require_range(self, 1, 1000, "retries")
        require_range(self, 0, 1, "max_reject_fraction")
        require_range(self, *SEEDS, "seed")
        for lr_size in self.lr_sizes:
            _require(1 <= lr_size < self.size, "lr_sizes", lr_size, f"sizes from 1 to {self.size - 1}")
        _require(len(set(self.lr_sizes)) == len(self.lr_sizes), "lr_sizes", self.lr_sizes, "each size once")
        _require(len(set(self.sizes)) == len(self.sizes), "sizes", self.sizes, "each size once")
        require_range(self, 0, MOST_THREADS, "encode_threads", "decode_threads", "gpus_per_worker", "cpus_per_worker")
        _require(
            re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device) is not None, "device", self.device, "cpu, cuda or cuda:1"
        )

    def with_crop(self) -> Self:
        """The same with `crop` "auto" decided."""
        full_resolution = self.source in FULL_RESOLUTION_SOURCES
        crop = self.crop
        if crop == "auto":
            crop = "random" if full_resolution or self.crops_per_image > 1 else "center"
        by_pixels = crop == "grid" or (full_resolution and self.crop_fraction == (1.0, 1.0))
        return self.replace(crop=crop, crop_pixels=self.crop_pixels or (self.size if by_pixels else 0))

    def each_size(self) -> list[PreprocessConfig]:
        """One run for each of `sizes`; without any, this one."""
        dest = self.dest.rstrip("/")
        return [self.replace(size=size, sizes=(), dest=f"{dest}/{size}") for size in self.sizes] or [self]

    @property
    def is_numbered(self) -> bool:
        """Whether an image may give several samples, whose ids then end in a number."""
        return self.crop == "grid" or self.crops_per_image > 1

    def max_rejected(self, num_images: int) -> int:
        """How many of `num_images` may be rejected."""
        if self.policy == "fail":
            return 0
        return max(int(self.max_reject_fraction * num_images), min(self.max_rejects, num_images // 2))

    def transform(self) -> dict[str, Any]:
        """The fields that decide the bytes of a sample, apart from the source and the autoencoder."""
        names = _TRANSFORM_FIELDS
        values = {name: getattr(self, name) for name in names}
        if self.condition_cells != "image":  # sets from before there was a choice keep their identity
            values["condition_cells"] = self.condition_cells
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@plain_help
@dataclass(frozen=True, kw_only=True)
class CheckConfig(PreprocessConfig):
    """A source and how it is to be cut: the options of a run decide what fits."""

    dest: Annotated[str, tyro.conf.Suppress] = ""
    policy: Annotated[Literal["fail", "skip", "quarantine"], tyro.conf.Suppress] = "skip"
    plan: Annotated[bool, tyro.conf.Suppress] = False
    processes: int = 0
    """Processes that read and decode; 0: the number of cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 0, MOST_THREADS, "processes")


@plain_help
@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recount and rehash a finished set. Exit status 1: something is damaged."""

    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """Folder of the shards (any fsspec URL)."""
    threads: int = 4
    """Shards that are looked at at once."""

    def __post_init__(self) -> None:
        require_range(self, 1, MOST_THREADS, "threads")


_TRANSFORM_FIELDS = (
    "size",
    "crop",
    "crops_per_image",
    "crop_fraction",
    "crop_pixels",
    "resize",
    "pixel_format",
    "dtype",
    "flips",
    "lr_sizes",
    "condition_resize",
    "max_pixels",
    "seed",
)
