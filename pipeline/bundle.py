"""The bundle: what is saved, registered, downloaded and loaded. safetensors and JSON only; loading is strict.

    config.json   autoencoder.safetensors   [decoder.safetensors]   [denoiser.safetensors]   README.md

A bundle may be partial: the autoencoder alone (after stage 0), with the implicit decoder (after alignment stage 1), or
complete. `config.json` is written last; it lists the SHA-256 of every weight file, so half a bundle is never loaded.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from pipeline import storage
from pipeline.autoencoder import Autoencoder
from pipeline.config import ModelConfig, from_dict, to_dict
from pipeline.decoder import ImplicitDecoder
from pipeline.denoiser import Denoiser
from pipeline.errors import Unreachable, UserError
from pipeline.importing.content import impostor
from pipeline.migrations import CONFIG_VERSION, MODEL_MIGRATIONS, migrated
from pipeline.starter import starter_or

T = TypeVar("T")
_TRIES = 5
FORMAT = "latentzoom-bundle/1"
PARTS = ("autoencoder", "decoder", "denoiser")
UNFINISHED = "unfinished"
"""In the meta of a bundle whose run was going on when it was written: step, of. A newer one may take its place."""
FILES = frozenset({"config.json", "README.md", *(f"{part}.safetensors" for part in PARTS)})
"""Everything that a bundle's folder may hold."""


@dataclass
class Bundle:
    """The parts of a model. `meta` is free JSON: data set digest, stage parents, whether weights are "ema" or "raw"."""

    config: ModelConfig
    autoencoder: Autoencoder
    decoder: ImplicitDecoder | None = None
    denoiser: Denoiser | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    card: str = ""


def build_autoencoder(config: ModelConfig, *, has_decoder: bool = True) -> Autoencoder:
    return Autoencoder(config.autoencoder, has_decoder=has_decoder)


def build_decoder(config: ModelConfig) -> ImplicitDecoder:
    return ImplicitDecoder(config.decoder, config.autoencoder.latent_channels)


def build_denoiser(config: ModelConfig) -> Denoiser:
    channels = config.autoencoder.latent_channels
    return Denoiser(config.denoiser, channels, channels if config.task == "sr" else 0)


def save_bundle(url: str, bundle: Bundle, *, overwrite: bool = True) -> None:
    """Write a bundle folder (any fsspec URL). Weights are stored in float32.

    overwrite: whether another bundle there is replaced, all of it. Where not, `UserError` for a folder that holds
    another bundle or anything else; the same bundle, or parts of one that was never finished, are no hindrance."""
    parts: dict[str, nn.Module | None] = {
        "autoencoder": bundle.autoencoder,
        "decoder": bundle.decoder,
        "denoiser": bundle.denoiser,
    }
    config: dict[str, Any] = {
        "format": FORMAT,
        "config_version": CONFIG_VERSION,
        "model": to_dict(bundle.config),
        "autoencoder_identity": bundle.autoencoder.identity(),
        "autoencoder_has_decoder": bundle.autoencoder.has_decoder,
        "meta": bundle.meta,
        "files": {},
    }
    with tempfile.TemporaryDirectory(prefix="latentzoom-") as folder:
        for name, module in parts.items():
            if module is None:
                continue
            tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in module.state_dict().items()}
            data = save_tensors(tensors)
            config["files"][f"{name}.safetensors"] = storage.sha256_bytes(data)
            Path(folder, f"{name}.safetensors").write_bytes(data)
        Path(folder, "README.md").write_text(bundle.card or f"# {bundle.config.name}\n")
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        Path(folder, "config.json").write_text(text)
        if not overwrite:
            check_vacant(url, text)
        if overwrite and set(storage.list_folder(url)) <= FILES:
            storage.replace_dir(folder, url, last="config.json")
            return
        storage.publish_dir(folder, url, last="config.json")
        for name in FILES - {path.name for path in Path(folder).iterdir()}:
            if storage.exists(storage.join(url, name)):  # of a bundle that had more parts
                storage.remove_tree(storage.join(url, name))


def check_vacant(url: str, config: str | None = None) -> None:
    """`UserError` where the folder `url` holds something else than the bundle whose config.json is `config` (None: any
    bundle, for a look before the work)."""
    there = storage.list_folder(url)
    if strange := sorted(name for name in set(there) - FILES if not name.startswith(".")):
        raise UserError(f"{url} holds {strange[0]!r}, which is no part of a bundle; give a new folder")
    if config is None or "config.json" not in there:
        return
    found = storage.read_bytes(storage.join(url, "config.json"))
    if found != config.encode():
        raise UserError(f"{url} holds another bundle already; give a new folder, or replace it with --overwrite")


def load_bundle(url: str) -> Bundle:
    """Load a bundle folder, or starter:LOOK, onto the CPU in evaluation mode. Raises `UserError` naming the file that
    is missing, damaged (SHA-256), or does not fit its configuration. One that is replaced meanwhile is read again."""
    url = starter_or(url) if url.startswith("starter:") else url
    return settled(url, lambda: _load_bundle(url))


def settled(url: str, read: Callable[[], T]) -> T:
    """What `read` makes of the bundle at `url`. Where it fails, it is read again as long as another takes its place."""
    for attempt in range(_TRIES):
        before = _identity(url) if attempt else b""  # what is sound is not looked at twice
        try:
            return read()
        except Unreachable:
            raise
        except (UserError, FileNotFoundError):
            if before is not None and _identity(url) == before:
                raise
    return read()


def _identity(url: str) -> bytes | None:
    try:
        return storage.read_bytes(storage.join(url, "config.json"))
    except (UserError, OSError):
        return None


def _load_bundle(url: str) -> Bundle:
    raw = _checked_config(url)
    bundle = _built(url, raw)
    for name in PARTS:
        if (part := getattr(bundle, name)) is not None:
            file = f"{name}.safetensors"
            _load_weights(part, storage.join(url, file), raw["files"].get(file))
    with contextlib.suppress(UserError):  # it may be missing; some stores answer "forbidden" then
        bundle.card = storage.read_bytes(storage.join(url, "README.md")).decode(errors="replace")
    return bundle


def outline(url: str) -> Bundle:
    """A bundle's parts without weights, on the device "meta": what can be known without fetching more than its
    config.json. Raises `UserError` as `load_bundle`."""
    url = starter_or(url) if url.startswith("starter:") else url
    with torch.device("meta"):
        return _built(url, _checked_config(url))


def _checked_config(url: str) -> dict[str, Any]:
    """A bundle's config.json, judged."""
    raw = read_config(url)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else None
        raise UserError(f"{url}/config.json has format {found!r}; this version reads {FORMAT!r}")
    missing = [name for name in ("model", "files", "autoencoder_has_decoder") if name not in raw]
    if missing:
        raise UserError(f"{url}/config.json is damaged: the field {missing[0]} is missing")
    for name in ("model", "files", "meta"):
        if not isinstance(raw.get(name, {}), dict):
            raise UserError(f"{url}/config.json is damaged: the field {name} is no object")
    return raw


def _built(url: str, raw: dict[str, Any]) -> Bundle:
    """The parts that a config.json names, with new weights."""
    version = int(raw.get("config_version", 1))
    model = migrated(raw["model"], version, MODEL_MIGRATIONS, f"{url}/config.json")
    config = from_dict(ModelConfig, model, where=f"{url}/config.json: model")
    files: dict[str, str] = raw["files"]
    autoencoder = build_autoencoder(config, has_decoder=bool(raw["autoencoder_has_decoder"]))
    decoder = build_decoder(config) if "decoder.safetensors" in files else None
    denoiser = build_denoiser(config) if "denoiser.safetensors" in files else None
    return Bundle(config, autoencoder, decoder, denoiser, raw.get("meta", {}))


def read_config(url: str) -> Any:
    """A bundle's config.json, parsed and not judged. `UserError` where none is there, and for what is no JSON or that
    of other weights."""
    file = storage.join(url, "config.json")
    if not storage.exists(file):
        if storage.is_local(url) and Path(url).is_file():
            raise UserError(
                f"{url} is a file, and a bundle is a folder; `latentzoom import` makes one of other weights"
            )
        raise UserError(f"no bundle at {url}: it has no config.json")
    if words := impostor(storage.read_head(file, 1024)):
        raise UserError(f"{file} is {words}")
    raw = storage.read_json(file)
    if isinstance(raw, dict) and "_class_name" in raw and "format" not in raw:
        raise UserError(
            f"{url} is of diffusers, no bundle; make one of it: latentzoom import diffusers {url} --out FOLDER"
        )
    return raw


def missing_parts(task: str, parts: Collection[str]) -> list[str]:
    """What nobody can use a bundle without: it renders nothing without the implicit decoder, and a model for
    super-resolution by diffusion needs its denoiser."""
    needed = ["autoencoder", "decoder", *(["denoiser"] if task == "sr" else [])]
    return [name for name in needed if name not in parts]


def _load_weights(module: nn.Module, url: str, sha256: str | None) -> None:
    data = storage.read_bytes(url)
    if words := impostor(data[:1024]):
        raise UserError(f"{url} is {words}")
    if sha256 is not None and storage.sha256_bytes(data) != sha256:
        raise UserError(f"{url} is damaged: its SHA-256 differs from the one in config.json")
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise UserError(f"{url} is not a safetensors file: {error}") from error
    load_strict(module, tensors, url)
    module.eval().requires_grad_(False)


def load_strict(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Load every tensor into `module`; a missing, left-over or ill-shaped key is a `UserError` that names it."""
    expected = module.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    shapes = [k for k in expected if k in tensors and expected[k].shape != tensors[k].shape]
    if missing or extra or shapes:
        problems = [f"missing {k}" for k in missing] + [f"left over {k}" for k in extra]
        problems += [f"{k} is {tuple(tensors[k].shape)}, expected {tuple(expected[k].shape)}" for k in shapes]
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{where} does not fit its configuration: {'; '.join(problems[:5])}{more}")
    module.load_state_dict(tensors)
