"""Networks that share another one's weights and nothing else."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def view_of(module: M) -> M:
    """The same network over the same memory, without gradient, in evaluation mode. Whatever is done to it (`eval`, `to`
    another device, precision or order in memory) leaves `module` as it is; what `module` learns later it sees, as long
    as it was not moved. Hooks and a compiled forward stay behind."""
    seen: dict[int, Any] = {}
    return _view(module, seen).eval()


def _view(module: Any, seen: dict[int, Any]) -> Any:
    if id(module) in seen:
        return seen[id(module)]
    view = seen[id(module)] = copy.copy(module)
    state = view.__dict__
    for name, value in state.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
            state[name] = OrderedDict()
    state["_compiled_call_impl"] = None
    state["_parameters"] = {name: _parameter(value, seen) for name, value in module._parameters.items()}
    state["_buffers"] = {name: None if b is None else b.detach() for name, b in module._buffers.items()}
    state["_modules"] = {name: None if m is None else _view(m, seen) for name, m in module._modules.items()}
    return view


def _parameter(parameter: nn.Parameter | None, seen: dict[int, Any]) -> nn.Parameter | None:
    if parameter is None:
        return None
    if id(parameter) not in seen:
        seen[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return seen[id(parameter)]
