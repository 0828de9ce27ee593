"""Reads the tensors of a PyTorch checkpoint without trusting it.

A `.ckpt` is a zip of raw storages and one pickle. Real ones hold framework objects beside the tensors (callbacks keyed
by a class of a package that is not installed). The pickle is read by an unpickler that knows a handful of names; every
other name becomes an inert placeholder, a class made here that swallows whatever it is called with. Nothing is
imported.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from pipeline import storage
from pipeline.errors import UserError
from pipeline.importing.content import format_of

MAX_PICKLE_BYTES = 1 << 28
"""The pickle of a checkpoint holds names and shapes only; more than this is not a checkpoint of weights."""

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_checkpoint(url: str) -> dict[str, Tensor]:
    """Name → tensor (CPU) of the `state_dict` in a checkpoint of PyTorch, in a safetensors file, or in the shards that
    an index lists. What the file holds decides, not its name.

    Raises `UserError` when the file is missing, damaged, in the format of PyTorch before 1.6, holds no tensors, or is
    something else altogether, which is named.
    """
    fs, path = storage.filesystem(url)
    with storage.reaching(url):
        if fs.isdir(path):
            raise UserError(f"{url} is a folder; give the checkpoint file")
    kind = format_of(url)
    if kind == "safetensors":
        return _read_safetensors(url)
    if kind == "json":
        return _read_shards(url)
    if kind == "zip":
        with storage.reaching(url), fs.open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise UserError(f"{url} is a PyTorch checkpoint that was cut short; download it again")
            return _tensors_of(_read_zip(file, url), url)
    hint = "it may be damaged"
    if kind == "pickle":
        hint = "it may have been saved by PyTorch before 1.6: load it there and save it again with a newer one"
    raise UserError(f"{url} is not a PyTorch zip checkpoint and not a safetensors file; {hint}")


def _read_safetensors(url: str) -> dict[str, Tensor]:
    try:
        return load_safetensors(storage.read_bytes(url))
    except SafetensorError as error:
        raise UserError(
            f"{url} is not a safetensors file that can be read: {error}; was the download cut short?"
        ) from error


def _read_shards(url: str) -> dict[str, Tensor]:
    """The tensors of all files that an index names: {"weight_map": {tensor: file beside the index}}."""
    index = storage.read_json(url)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{url} is a JSON file, not weights and not an index of shards")
    folder = url.rpartition("/")[0]
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        if "/" in file or file in ("", ".", ".."):
            raise UserError(f"{url} names a shard outside its folder: {file!r}")
        shard = f"{folder}/{file}" if folder else file
        if format_of(shard) == "json":
            raise UserError(f"{shard} is a JSON file, not a shard")
        tensors |= read_checkpoint(shard)
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise UserError(f"{url} lists {missing[0]}, which none of its shards holds; are they of one download?")
    return tensors


def _tensors_of(root: Any, url: str) -> dict[str, Tensor]:
    """The state dict at the root or under `state_dict`; every value must be a tensor."""
    state = root.get("state_dict", root) if isinstance(root, dict) else root
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{url} holds no state_dict of tensors")
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise UserError(f"{url}: the state_dict's entry {others[0]!r} is not a tensor")
    return dict(state)


def _read_zip(file: IO[bytes], url: str) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(names) != 1:
                raise UserError(f"{url} is a zip file but not a checkpoint: it has no data.pkl")
            prefix = names[0].removesuffix("data.pkl")
            if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
                raise UserError(f"{url} was written on a big-endian machine, which is not supported")
            info = archive.getinfo(names[0])
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > MAX_PICKLE_BYTES:
                raise UserError(f"{url} is not a checkpoint: its data.pkl is compressed or too large")
            with archive.open(info) as pickled:
                return _RestrictedUnpickler(pickled, archive, prefix).load()
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can fail anywhere in here; all of it is the file's fault
        raise UserError(f"{url} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves OrderedDict, tensor rebuilding and storage types; any other name is a placeholder.

    Everything handed to the pickle is made for this one read, so that nothing it changes outlives the read.
    """

    def __init__(self, pickled: IO[bytes], archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(pickled, encoding="utf-8")
        self._archive, self._prefix = archive, prefix
        self._storages: dict[str, Tensor] = {}
        self._allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): lambda flat, offset, size, stride: _view(flat, offset, size, stride),
            ("torch._utils", "_rebuild_tensor_v2"): lambda flat, offset, size, stride, *_: _view(
                flat, offset, size, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        return _placeholder(module, name)

    def persistent_load(self, pid: Any) -> Tensor:
        """("storage", type, key, location, number of elements) → the storage as a flat tensor."""
        kind, storage_type, key, _, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise UserError(f"the checkpoint refers to an unknown kind of storage: {kind!r}")
        if key not in self._storages:
            info = self._archive.getinfo(f"{self._prefix}data/{key}")
            size = int(numel) * storage_type.dtype.itemsize
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
                raise UserError(f"storage {key} has {info.file_size} bytes, its tensors need {size}")
            data = bytearray(self._archive.read(info))
            flat = torch.frombuffer(data, dtype=storage_type.dtype, count=int(numel)) if numel else torch.empty(0)
            self._storages[key] = flat.to(storage_type.dtype)
        return self._storages[key]


class _StorageType:
    """Stands for torch.FloatStorage and its like: a name for a dtype, nothing that can be called."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _view(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """A copy of the tensor that lies in `flat` at `offset`; raises when it would reach outside, or be larger."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    outside = 0 not in size and (last >= flat.numel() or math.prod(size) > flat.numel())
    if offset < 0 or min((*size, *stride), default=0) < 0 or outside:
        raise UserError("a tensor reaches outside its storage")
    return torch.as_strided(flat, size, stride, offset).clone()


def _placeholder(module: str, name: str) -> type:
    """A class that can be instantiated, filled and given a state, none of which does anything."""

    def ignore(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    methods = dict.fromkeys(("__init__", "__setstate__", "__setitem__", "append", "extend", "add"), ignore)
    return type(f"Placeholder({module}.{name})", (), {"__new__": make, **methods})
