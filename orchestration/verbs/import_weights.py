"""`latentzoom import {released,ldm,diffusers,hub-folder,onnx}`: weights that exist elsewhere become a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from pipeline.command_line import Flag, kind_of, parse, plain_help
from pipeline.common_options import answer, out
from pipeline.errors import require_range
from pipeline.sizes import MAX_SIDE

if TYPE_CHECKING:
    from pipeline.bundle import Bundle


@plain_help
@dataclass(frozen=True)
class Released:
    """A checkpoint of the method's released code: first stage with implicit decoder, or a whole model."""

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The .ckpt file (path or URL)."""
    model_config: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The YAML configuration that it was trained with."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where the bundle goes (path or URL)."""
    raw: Flag = False
    """Take the raw weights of the denoiser, not their moving average (EMA)."""
    overwrite: Flag = False
    """Replace another bundle in that folder."""
    lr_size: int | None = None
    """Pixels of the low-resolution input that a super-resolution model was trained on; without it the latent's size."""
    name: str = ""
    """The model's name; without it the file's."""

    def __post_init__(self) -> None:
        require_range(self, 1, MAX_SIDE, "lr_size")


@plain_help
@dataclass(frozen=True)
class Ldm:
    """A latent-diffusion checkpoint (CompVis): a KL or VQ first stage, alone or with an unconditional U-Net."""

    ckpt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The .ckpt file (path or URL)."""
    model_config: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Its YAML configuration."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where the bundle goes (path or URL). It has no implicit decoder: train the stage `decoder` on it."""
    raw: Flag = False
    """Take the raw weights, not their moving average (EMA)."""
    overwrite: Flag = False
    """Replace another bundle in that folder."""
    name: str = ""
    """The model's name; without it the file's."""


@plain_help
@dataclass(frozen=True)
class Diffusers:
    """A diffusers folder: AutoencoderKL or VQModel, alone or in a pipeline with a UNet2DModel; or the pipeline folder
    of `latentzoom export --to diffusers`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A local folder, a weight file beside its config.json, or a hub id such as owner/name (needs the network unless it
    is cached)."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where the bundle goes (path or URL)."""
    unet: Annotated[str, tyro.conf.arg(metavar="SOURCE")] = ""
    """Another folder or hub id that holds the U-Net."""
    revision: str = ""
    """Branch, tag or commit on the hub."""
    overwrite: Flag = False
    """Replace another bundle in that folder."""
    name: str = ""
    """The model's name; without it the folder's."""


@plain_help
@dataclass(frozen=True)
class HubFolder:
    """A bundle from the Hugging Face hub, or the folder of `latentzoom export --to hub-folder`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A local folder, or a hub id such as owner/name (needs the network unless it is cached)."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where the bundle goes (path or URL)."""
    revision: str = ""
    """Branch, tag or commit on the hub."""
    overwrite: Flag = False
    """Replace another bundle in that folder."""
    name: str = ""
    """The model's name; without it its own."""


@plain_help
@dataclass(frozen=True)
class Onnx:
    """The folder of `latentzoom export --to onnx`: encoder and implicit decoder (needs the extra export)."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The folder of the .onnx files."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where the bundle goes (path or URL). It has no denoiser."""
    overwrite: Flag = False
    """Replace another bundle in that folder."""
    name: str = ""
    """The model's name; without it its own."""


Wanted = Released | Ldm | Diffusers | HubFolder | Onnx
KINDS: dict[str, type[Wanted]] = {
    "released": Released,
    "ldm": Ldm,
    "diffusers": Diffusers,
    "hub-folder": HubFolder,
    "onnx": Onnx,
}


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help(), file=out())
        return 0 if argv else 2
    return _run(parsed(argv))


def parsed(argv: list[str]) -> Wanted:
    """What a command line asks for."""
    kind, words = kind_of(argv, list(KINDS), "latentzoom import")
    return parse(KINDS[kind], words, prog=f"latentzoom import {kind}")


def _help() -> str:
    lines = ["usage: latentzoom import KIND ...", "", "Weights that exist elsewhere become a bundle.", "", "kinds:"]
    lines += [f"  {name:12} {(kind.__doc__ or '').strip()}" for name, kind in KINDS.items()]
    return "\n".join([*lines, "", "latentzoom import KIND --help lists the options."])


def _run(wanted: Wanted) -> int:
    from pipeline.bundle import PARTS, check_vacant, save_bundle

    if not wanted.overwrite:  # before the work, as far as it can be known: a folder of other things, or a file
        check_vacant(wanted.out)
    bundle = _imported(wanted)
    if left_out := bundle.meta.get("imported_from", {}).get("left_out"):
        print(f"note: its denoiser ({left_out}) takes text or other conditions; only its autoencoder is imported")
    save_bundle(wanted.out, bundle, overwrite=wanted.overwrite)
    parts = [name for name in PARTS if getattr(bundle, name) is not None]
    weights = f", {bundle.meta['weights']} weights" if "weights" in bundle.meta else ""
    facts = {"out": wanted.out, "name": bundle.config.name, "parts": parts, "weights": bundle.meta.get("weights", "")}
    answer(f"wrote {wanted.out}: {bundle.config.name} ({', '.join(parts)}{weights})", facts)
    return 0


def _imported(wanted: Wanted) -> Bundle:
    from pipeline.importing.diffusers_folder import import_diffusers
    from pipeline.importing.hub_folder import import_hub_folder
    from pipeline.importing.latent_diffusion import import_checkpoint
    from pipeline.importing.onnx_files import import_onnx

    name = wanted.name or None
    if isinstance(wanted, HubFolder):
        return import_hub_folder(wanted.source, revision=wanted.revision or None, name=name)
    if isinstance(wanted, Onnx):
        return import_onnx(wanted.source, name=name)
    if isinstance(wanted, Diffusers):
        return import_diffusers(wanted.source, unet=wanted.unet or None, revision=wanted.revision or None, name=name)
    weights: Literal["ema", "raw"] = "raw" if wanted.raw else "ema"
    if isinstance(wanted, Ldm):
        return import_checkpoint(wanted.ckpt, wanted.model_config, "ldm", weights=weights, name=name)
    bundle = import_checkpoint(
        wanted.ckpt, wanted.model_config, "released", weights=weights, lr_size=wanted.lr_size, name=name
    )
    if bundle.config.task == "sr" and bundle.denoiser is not None and wanted.lr_size is None:
        print(f"note: taking {bundle.config.lr_size} as the LR size (the latent's); if it differs, give --lr-size")
    return bundle
