"""Strict copying of checkpoint tensors into our modules: every parameter is found, every tensor of a part is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pipeline.bundle import load_strict
from pipeline.errors import UserError
from pipeline.importing.names import Source

_SHOWN = 5


def transfer(
    module: nn.Module,
    sources: Mapping[str, Source],
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    heads: Callable[[int], int] | None = None,
) -> None:
    """Fill `module`: `sources` tells for each of its parameters which tensor to take. Raises `UserError` naming the
    tensors (by the checkpoint's own names) that are missing or ill-shaped. heads: width → number
    of attention heads, needed where query, key and value lie in one tensor."""
    expected = module.state_dict()
    assert set(sources) == set(expected), sorted(set(sources) ^ set(expected))
    check_keys({source.key for source in sources.values()}, tensors, where)
    values = {}
    for name, source in sources.items():
        values[name] = _shaped(tensors[source.key], source, expected[name], heads, where)
    load_strict(module, values, where)
    module.eval().requires_grad_(False)


def check_keys(wanted: set[str], present: Mapping[str, object] | set[str], where: str) -> None:
    """`UserError` naming what of `wanted` is not in `present`."""
    _refuse("misses", sorted(wanted - set(present)), where, "does the configuration belong to it?")


def check_left_over(keys: set[str], where: str) -> None:
    """`UserError` naming `keys`, tensors of the checkpoint that nothing took."""
    _refuse("has left over", sorted(keys), where, "the configuration describes a smaller or another model")


def _refuse(verb: str, names: list[str], where: str, hint: str) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UserError(f"{where} {verb} {', '.join(names[:_SHOWN])}{more}; {hint}")


def _shaped(tensor: Tensor, source: Source, target: Tensor, heads: Callable[[int], int] | None, where: str) -> Tensor:
    """The part of `tensor` meant by `source`, with the target's shape: 1×1 convolutions become linear layers."""
    if source.part is not None:
        assert heads is not None
        width = target.shape[0]
        if tensor.ndim == 0 or tensor.shape[0] != 3 * width:
            raise UserError(f"{where}: {source.key} is {tuple(tensor.shape)}, expected {3 * width} rows")
        # Rows are grouped head by head: (heads, 3, width of a head).
        grouped = tensor.reshape(heads(width), 3, -1, *tensor.shape[1:])
        tensor = grouped[:, source.part].reshape(width, *tensor.shape[1:])
    if _trimmed(tensor) != _trimmed(target):
        raise UserError(f"{where}: {source.key} is {tuple(tensor.shape)}, expected {tuple(target.shape)}")
    return tensor.reshape(target.shape).to(target.dtype)


def _trimmed(tensor: Tensor) -> tuple[int, ...]:
    """The shape without 1s at its end."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return tuple(shape)
