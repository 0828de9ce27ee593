"""Weight files of feature networks: found by path, URL or in the cache, checked by SHA-256, never unpickled freely.

State dicts are read with `torch.load(weights_only=True)` or safetensors, TorchScript with `torch.jit.load` and only
after its checksum matched. Files are the well-known ones; another file with the right name is refused.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from pipeline import storage
from pipeline.bundle import load_strict
from pipeline.errors import UserError
from pipeline.metrics.backbones import Vgg16
from pipeline.metrics.inception import Inception2015, ScriptedInception
from pipeline.metrics.lpips import Lpips


@dataclass(frozen=True)
class WeightFile:
    """A known file. form: how it is stored."""

    name: str
    sha256: str
    form: str = "state_dict"


INCEPTION = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth", "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
)
INCEPTION_SCRIPT = WeightFile(
    "inception-2015-12-05.pt", "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4", "torchscript"
)
ALEXNET = WeightFile("alexnet-owt-7be5be79.pth", "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02")
VGG16 = WeightFile("vgg16-397923af.pth", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")
ALEXNET_HEADS = WeightFile("alex.pth", "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0")
KNOWN = (INCEPTION, INCEPTION_SCRIPT, ALEXNET, VGG16, ALEXNET_HEADS)
_HEAD_PLACES = (("torchmetrics", "functional/image/lpips_models/alex.pth"), ("lpips", "weights/v0.1/alex.pth"))


def load_inception(location: str, known: tuple[WeightFile, ...] = (INCEPTION, INCEPTION_SCRIPT)) -> nn.Module:
    """Inception 2015 from either of its two files: uint8 (B,3,H,W) → (B,2048)."""
    data, file = read_weights(location, known)
    if file.form == "torchscript":
        return ScriptedInception(torch.jit.load(io.BytesIO(data), map_location="cpu").eval())
    return _frozen(Inception2015(), parse_state_dict(data, location), location)


def load_vgg16(location: str, known: tuple[WeightFile, ...] = (VGG16,)) -> Vgg16:
    """VGG16 whose forward gives fc2 activations: uint8 (B,3,H,W) → (B,4096)."""
    data, _ = read_weights(location, known)
    tensors = {k: v for k, v in parse_state_dict(data, location).items() if not k.startswith("classifier.6.")}
    model = Vgg16()
    _frozen(model, tensors, location)
    return model


def load_lpips(
    location: str,
    heads: str = "",
    known: tuple[WeightFile, ...] = (ALEXNET,),
    known_heads: tuple[WeightFile, ...] = (ALEXNET_HEADS,),
) -> Lpips:
    """LPIPS v0.1 on AlexNet. `heads` defaults to the file inside an installed torchmetrics or lpips package."""
    data, _ = read_weights(location, known)
    heads = heads or installed_heads()
    head_data, _ = read_weights(heads, known_heads)
    model = Lpips("alexnet")
    convolutions = {k: v for k, v in parse_state_dict(data, location).items() if k.startswith("features.")}
    learned = {f"heads.{i}": v.flatten() for i, v in enumerate(_ordered(parse_state_dict(head_data, heads)).values())}
    _frozen(model, convolutions | learned, location)
    return model


def installed_heads() -> str:
    """LPIPS heads for AlexNet from an installed package, found without importing it."""
    for package, path in _HEAD_PLACES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / path).is_file():
                return str(Path(folder) / path)
    raise UserError("no LPIPS heads were found; give --lpips-heads alex.pth (LPIPS v0.1), or install torchmetrics")


def read_weights(location: str, known: tuple[WeightFile, ...]) -> tuple[bytes, WeightFile]:
    """Content of a weight file and which known file it is, by checksum. `location`: path, fsspec URL, or a bare name
    looked up in the cache (LATENTZOOM_WEIGHTS, default ~/.cache/latentzoom/weights). URLs are kept in the cache."""
    cache = Path(os.environ.get("LATENTZOOM_WEIGHTS") or Path.home() / ".cache" / "latentzoom" / "weights")
    url = location
    if not storage.is_local(location) or not storage.exists(location):
        cached = cache / location.rstrip("/").rsplit("/", 1)[-1]
        if cached.is_file():
            url = str(cached)
    try:
        data = storage.read_bytes(url)
    except OSError as error:
        raise UserError(f"cannot read weights {location}: {error}") from error
    digest = storage.sha256_bytes(data)
    found = next((file for file in known if file.sha256 == digest), None)
    if found is None:
        wanted = " or ".join(f"{file.name} ({file.sha256[:12]}...)" for file in known)
        raise UserError(f"{url} has SHA-256 {digest[:12]}..., which is not that of {wanted}; download it again")
    if not storage.is_local(url):
        storage.write_bytes(str(cache / location.rstrip("/").rsplit("/", 1)[-1]), data)
    return data, found


def parse_state_dict(data: bytes, where: str) -> dict[str, Tensor]:
    """A state dict (PyTorch or safetensors) of tensors only; anything else in a pickle is refused, not executed."""
    try:
        if data[:1] != b"P" and data[8:9] == b"{":
            return load_safetensors(data)
        loaded: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{where} is not a safetensors file: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where} is not a plain state dict, so it is not loaded: {reason[:200]}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{where} holds more than tensors; a state dict is needed")
    return {str(k): v for k, v in loaded.items()}


def _ordered(heads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Head k is `lin{k}.model.1.weight`."""
    return dict(sorted(heads.items(), key=lambda item: int("".join(c for c in item[0].split(".")[0] if c.isdigit()))))


def _frozen(model: nn.Module, tensors: dict[str, Tensor], where: str) -> nn.Module:
    load_strict(model, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, where)
    return model.eval().requires_grad_(False)
