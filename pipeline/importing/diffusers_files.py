"""The files of a diffusers model: which of them holds the weights, here or on the Hugging Face hub.

A folder keeps its weights whole or in shards with an index, as safetensors or pickled, in full precision or as a
variant (fp16, bf16, non_ema) whose name is a part of the file's.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError, first_line
from pipeline.file_systems import local_path

_STEM = "diffusion_pytorch_model"
_FULL = tuple(f"{_STEM}.{end}" for end in ("safetensors", "safetensors.index.json", "bin", "bin.index.json"))
"""In the order in which they are taken."""
_VARIANTS = (f"{_STEM}.*.safetensors", f"{_STEM}.*index*.json", f"{_STEM}.*.bin")
_SHARDS = f"{_STEM}*-of-*"
_CONFIGS = ("config.json", "scheduler_config.json", "model_index.json")


def weights_in(folder: Path) -> Path:
    """The weight file of a folder, or the index of its shards: full precision first, then a variant, then the only file
    with weights whatever its name. `UserError` when there is none, or no telling which."""
    for name in _FULL:
        if (folder / name).is_file():
            return folder / name
    for pattern in _VARIANTS:
        if found := sorted(file for file in folder.glob(pattern) if "-of-" not in file.name):
            return found[0]
    others = sorted(file for end in ("safetensors", "bin", "ckpt", "pt", "pth") for file in folder.glob(f"*.{end}"))
    if len(others) == 1:
        return others[0]
    if others and all("-of-" in file.name for file in others):
        raise UserError(f"{folder} holds shards without their index, {_FULL[1]}; copy it there as well")
    if others:
        raise UserError(f"{folder} holds {len(others)} weight files ({others[0].name}, ...); give the one you mean")
    raise UserError(f"{folder} holds none of {', '.join(_FULL)}")


def local_or_hub(source: str, revision: str | None) -> Path:
    """The folder itself, or the hub's snapshot of it: its configurations, then only the weights that they ask for."""
    if (folder := local_folder(source)) is not None:
        return folder
    root = snapshot(source, revision, [f"{place}{file}" for place in ("", "*/") for file in _CONFIGS])
    places = [
        f"{name}/" for name in ("vae", "vqvae", "unet", "decoder") if (root / name / "config.json").is_file()
    ] or [""]
    if "unet/" in places and "UNet2DModel" not in (root / "unet" / "config.json").read_text().split('"'):
        places.remove("unet/")  # gigabytes that would be left out
    root = snapshot(source, revision, [f"{place}{file}" for place in places for file in (*_FULL[:2], _SHARDS)])
    for place in places:
        try:
            weights_in(root / place)
        except UserError:
            root = snapshot(source, revision, [f"{place}{file}" for file in (*_FULL, *_VARIANTS, _SHARDS)])
    return root


def local_folder(source: str) -> Path | None:
    """The folder where it is one of this machine; None for what may be a hub id. `UserError` for anything else."""
    folder = local_path(source)
    if folder is not None and folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        if "://" in source:
            raise UserError(f"{source} is an address; fetch the folder first, or give a hub id of the form owner/name")
        raise UserError(f"no such folder: {source} (and it is not a hub id of the form owner/name)")
    return None


def snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a repository on the hub whose names match, from the cache where they are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{source} is no local folder and cannot be fetched from the hub: {first_line(error)}"
        ) from error
