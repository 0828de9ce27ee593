"""A second device for machines without one: its tensors are the CPU's, and remember where they are said to be.

An operation that is given tensors of both devices is an error, as it is on CUDA: all but copies, whose purpose that is,
and numbers (0-dimensional CPU tensors), which CUDA takes too. What the host waits for is listed: values read back, and
copies either way that were not asked for as non-blocking.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
_aten = torch.ops.aten
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::_foreach_copy_"}
_STRICT = {"aten::cat", "aten::stack"}
"""Numbers of the other device are refused here too, as on CUDA."""
_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}


class WrongDevice(AssertionError):
    """An operation on tensors of two devices."""


class Placed(torch.Tensor):
    """A tensor of the second device; `held` has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held!r})"

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


waits: list[str] = []
"""Where the host has waited for the second device, as stacks of calls."""


def _note_wait() -> None:
    waits.append("".join(traceback.format_stack(limit=14)[:-2]))


def _waits(name: str, args: Any, kwargs: dict[str, Any], placed: list[Placed]) -> bool:
    """Whether CUDA would have the host wait in an operation."""
    if name not in ("aten::_to_copy", "aten::copy_"):
        return name in _READS and bool(placed)
    if kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]):
        return False
    source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], None)
    if not isinstance(source, torch.Tensor) or not source.numel():
        return False
    ends_here = isinstance(target, Placed) if target is not None else _asked(kwargs) == NAME
    leaves = not isinstance(target, Placed) if target is not None else _asked(kwargs) == "cpu"
    return leaves if isinstance(source, Placed) else ends_here


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function._schema.name
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    placed = [tensor for tensor in tensors if isinstance(tensor, Placed)]
    others = [t for t in tensors if not isinstance(t, Placed) and (t.ndim or name in _STRICT)]
    if placed and others and name not in _COPIES:
        raise WrongDevice(f"{name} is given tensors on {NAME}:0 and on cpu: {[tuple(t.shape) for t in tensors]}")
    if _waits(name, args, kwargs, placed):
        _note_wait()
    lands_here = _asked(kwargs) == NAME or (_asked(kwargs) is None and bool(placed))
    plain = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
    inner_args, inner = tree_map(_unwrapped, (args, plain))
    made = function(*inner_args, **inner)
    written = [
        isinstance(r.alias_info, torch._C._AliasInfo) and r.alias_info.is_write for r in function._schema.returns
    ]
    if any(written):  # in place, or into out=: what was given comes back
        given = {id(_unwrapped(tensor)): tensor for tensor in tensors}
        return tree_map(lambda value: given.get(id(value), value), made)
    return tree_map(_wrapped, made) if lands_here else made


def _asked(kwargs: dict[str, Any]) -> str | None:
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type


def _unwrapped(value: Any) -> Any:
    return value.held if isinstance(value, Placed) else value


def _wrapped(value: Any) -> Any:
    return Placed(value) if isinstance(value, torch.Tensor) and not isinstance(value, Placed) else value


class _Module(_DummyBackendModule):
    """What torch asks a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def _register() -> None:
    """Once a process, and it cannot be undone."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _libraries.append(torch.library.Library("_", "IMPL", "AutocastPrivateUse1"))
    _libraries[0].fallback(
        torch.library.fallthrough_kernel
    )  # autocast changes nothing: places are looked at, not types
    # What `new_tensor` does, which goes past modes.
    aten = torch.library.Library("aten", "IMPL")
    _libraries.append(aten)
    aten.impl(
        "empty_strided",
        lambda size, stride, dtype=None, **_: Placed(torch.empty_strided(size, stride, dtype=dtype)),
        "PrivateUse1",
    )
    aten.impl("_copy_from", _copy_from, "PrivateUse1")


def _copy_from(source: torch.Tensor, target: Any, non_blocking: bool = False) -> Any:
    if not non_blocking and not isinstance(source, Placed):
        _note_wait()
    target.held.copy_(_unwrapped(source))
    return target


_libraries: list[torch.library.Library] = []


@contextlib.contextmanager
def second_device() -> Iterator[_Mode]:
    """Within, `torch.device("second")` is there."""
    _register()
    before = list(_foreach_utils._foreach_supported_types)
    _foreach_utils._foreach_supported_types.append(Placed)
    try:
        with _Mode() as mode:
            yield mode
    finally:
        _foreach_utils._foreach_supported_types[:] = before
