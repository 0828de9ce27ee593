"""The averaged weights as parts of the bundle that a stage trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from pipeline.bundle import build_autoencoder, build_decoder, build_denoiser
from pipeline.config import ModelConfig
from training.config import StageConfig, is_joint
from training.context import Context

Weights = Mapping[str, Tensor]
N = TypeVar("N", bound=nn.Module)


def averaged_part(context: Context, name: str, weights: Weights | None) -> Any:
    """One part of the bundle with the whole averaged weights that the stage's engine gave, ready for use on the
    device; None where it gave none, which is on all workers but the main one."""
    if weights is None:
        return None
    part = part_builders(context.config)[name](context.model)
    part.load_state_dict(weights_by_part(context.stage, weights, joint=is_joint(context.config))[name], strict=True)
    return ready(part, context)


def ready(network: N, context: Context) -> N:
    """The network on the device, to be used and not trained."""
    return network.to(context.world.device).eval().requires_grad_(False)


def part_builders(config: StageConfig) -> dict[str, Callable[[ModelConfig], nn.Module]]:
    """Part of a bundle → what builds it, with new weights, as the stage trains it."""
    return {
        "autoencoder": partial(build_autoencoder, has_decoder=not is_joint(config)),
        "decoder": build_decoder,
        "denoiser": build_denoiser,
    }


def weights_by_part(stage: str, weights: Weights, *, joint: bool) -> dict[str, dict[str, Tensor]]:
    """Part of the bundle → its weights by name, from those of the network that a stage's engine trains. joint: encoder
    and implicit decoder are one network."""
    if stage == "autoencoder":
        names = ("autoencoder", "decoder") if joint else ("autoencoder",)
        if all(key.startswith(tuple(f"{name}." for name in names)) for key in weights):
            return {n: {k.removeprefix(f"{n}."): v for k, v in weights.items() if k.startswith(f"{n}.")} for n in names}
    return {stage if stage in ("autoencoder", "decoder") else "denoiser": dict(weights)}
