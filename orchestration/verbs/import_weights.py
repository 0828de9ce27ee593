"""`latentzoom import {released,ldm,diffusers}`: weights that exist elsewhere become a bundle."""

from __future__ import annotations

from typing import Annotated

import tyro

from pipeline.bundle import PARTS, Bundle, check_vacant, save_bundle
from pipeline.errors import exit_status
from pipeline.importing.diffusers_folder import import_diffusers
from pipeline.importing.latent_diffusion import import_checkpoint

Argument = Annotated[str, tyro.conf.Positional]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def released(
    ckpt: Argument,
    /,
    *,
    config: str,
    out: str,
    raw: Flag = False,
    overwrite: Flag = False,
    lr_size: int | None = None,
    name: str | None = None,
) -> Bundle:
    """A checkpoint of the method's released code: first stage with implicit decoder, or a whole model.

    Args:
        ckpt: the .ckpt file (path or URL).
        config: the YAML configuration that it was trained with.
        out: where the bundle goes (path or URL).
        raw: take the raw weights of the denoiser, not their moving average (EMA).
        lr_size: pixels of the low-resolution input a super-resolution model was trained on; default: the latent's size.
        overwrite: replace another bundle in that folder.
        name: the model's name; default: the file's.
    """
    _check_out(out, overwrite)
    bundle = import_checkpoint(ckpt, config, "released", weights="raw" if raw else "ema", lr_size=lr_size, name=name)
    if bundle.config.task == "sr" and bundle.denoiser is not None and lr_size is None:
        print(f"note: taking {bundle.config.lr_size} as the LR size (the latent's); if it differs, give --lr-size")
    return _saved(bundle, out, overwrite)


def ldm(
    ckpt: Argument, /, *, config: str, out: str, raw: Flag = False, overwrite: Flag = False, name: str | None = None
) -> Bundle:
    """A latent-diffusion checkpoint (CompVis): a KL or VQ first stage, alone or with an unconditional U-Net.

    Args:
        ckpt: the .ckpt file (path or URL).
        config: its YAML configuration.
        out: where the bundle goes (path or URL). It has no implicit decoder: train the stage `decoder` on it.
        raw: take the raw weights, not their moving average (EMA).
        overwrite: replace another bundle in that folder.
        name: the model's name; default: the file's.
    """
    _check_out(out, overwrite)
    bundle = import_checkpoint(ckpt, config, "ldm", weights="raw" if raw else "ema", name=name)
    return _saved(bundle, out, overwrite)


def diffusers(
    source: Argument,
    /,
    *,
    out: str,
    unet: str | None = None,
    revision: str | None = None,
    overwrite: Flag = False,
    name: str | None = None,
) -> Bundle:
    """A diffusers folder: AutoencoderKL or VQModel, alone or in a pipeline with a UNet2DModel.

    Args:
        source: a local folder, a weight file beside its config.json, or a hub id such as owner/name (needs the network
            unless it is cached).
        out: where the bundle goes (path or URL).
        unet: another folder or hub id that holds the U-Net.
        revision: branch, tag or commit on the hub.
        overwrite: replace another bundle in that folder.
        name: the model's name; default: the folder's.
    """
    _check_out(out, overwrite)
    bundle = import_diffusers(source, unet=unet, revision=revision, name=name)
    return _saved(bundle, out, overwrite)


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    return exit_status(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    tyro.extras.subcommand_cli_from_dict(
        {"released": released, "ldm": ldm, "diffusers": diffusers},
        prog="latentzoom import",
        description=__doc__,
        args=argv,
    )
    return 0


def _check_out(out: str, overwrite: bool) -> None:
    """Before the work, as far as it can be known: a folder of other things, or a file."""
    if not overwrite:
        check_vacant(out)


def _saved(bundle: Bundle, out: str, overwrite: bool) -> Bundle:
    if left_out := bundle.meta["imported_from"].get("left_out"):
        print(f"note: its denoiser ({left_out}) takes text or other conditions; only its autoencoder is imported")
    save_bundle(out, bundle, overwrite=overwrite)
    parts = [n for n in PARTS if getattr(bundle, n) is not None]
    weights = f", {bundle.meta['weights']} weights" if "weights" in bundle.meta else ""
    print(f"wrote {out}: {bundle.config.name} ({', '.join(parts)}{weights})")
    return bundle
