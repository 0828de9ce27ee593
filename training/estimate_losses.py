"""What the networks within a loss take: LPIPS and stage 0's discriminator. For training/estimate.py.

They stand outside the engine: no averages, no master weights, and none of their state is shared among workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.metrics.lpips import Lpips
from training.adversary import PatchDiscriminator
from training.config import AutoencoderStage, DecoderStage, StageConfig, is_joint
from training.perceptual import PerceptualLoss


@dataclass(frozen=True)
class LossNetworks:
    """For one micro-batch. kept_bytes: what the backward pass needs, beside the trained network's; alone_bytes: what is
    kept after that, when the discriminator learns. flops: at every step; late_flops: those that are more once the
    discriminator takes part, after step `start`."""

    frozen_parameters: int = 0
    state_bytes: int = 0
    kept_bytes: int = 0
    alone_bytes: int = 0
    flops: float = 0.0
    late_flops: float = 0.0
    start: int = 0


def loss_networks(config: StageConfig, shape: tuple[int, ...]) -> LossNetworks:
    """Of a stage whose loss compares pictures of this shape (B,3,H,W)."""
    if not isinstance(config, (AutoencoderStage, DecoderStage)) or is_joint(config):
        return LossNetworks()
    num_frozen, kept, lpips = _perceptual(config, shape) if config.perceptual_weight else (0, 0, 0.0)
    if not isinstance(config, AutoencoderStage) or not config.adversarial_weight:
        return LossNetworks(num_frozen, 0, kept, 0, 3 * lpips)
    with torch.device("meta"):
        network, made = PatchDiscriminator(), torch.empty(shape, requires_grad=True)
        with FlopCounterMode(display=False) as counter, kept_by_backward() as alone:
            network(made.detach())
        network.requires_grad_(False)
        with kept_by_backward() as beside:
            network(made * 1.0)
    # Its opinion with the gradient by the picture (2); its own step on a true and a made picture (2 × 3); and for the
    # balance the gradients by the picture once more.
    is_adaptive = config.adversarial_balance == "adaptive"
    late = 8.0 * counter.get_total_flops() + is_adaptive * (counter.get_total_flops() + lpips)
    # Float32 weights, gradients and two moments.
    state = 16 * sum(p.numel() for p in network.parameters())
    return LossNetworks(
        num_frozen, state, kept + beside.total, 2 * alone.total, 3 * lpips, late, config.adversarial_start
    )


def _perceptual(config: AutoencoderStage | DecoderStage, shape: tuple[int, ...]) -> tuple[int, int, float]:
    """LPIPS: parameters; bytes kept for the gradient by the made picture, the truth's features among them; and
    floating-point operations of one pass. Three passes are a step's: the truth, the made picture, and back by it."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    net = "vgg16" if config.lpips_weights in ("", "random", "vgg16") else "alexnet"
    # Fake tensors, not those of the "meta" device, for which there is no autocast.
    with FakeTensorMode():
        network = PerceptualLoss(Lpips(net))  # type: ignore[arg-type]
        network.dtype = dtype
        made = torch.empty(shape, requires_grad=True)
        with torch.no_grad():
            features = network._features(made)
        with FlopCounterMode(display=False) as counter, kept_by_backward() as kept:
            network._features(made * 1.0)
    num = sum(p.numel() for p in network.lpips.parameters())
    # Of each layer the difference of features, and the truth's; weights in half precision are copies.
    held = 2 * sum(tap.untyped_storage().nbytes() for tap in features) + (num * 2 if dtype != torch.float32 else 0)
    return num, kept.total + held, float(counter.get_total_flops())


@contextlib.contextmanager
def kept_by_backward() -> Iterator[SavedBytes]:
    """Within, what autograd keeps is added up."""
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        yield saved


class SavedBytes:
    """Adds up the tensors that autograd keeps, each storage once, weights left out."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[int, torch.UntypedStorage] = {}  # kept alive, or another could have its key

    def pack(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            self.add(tensor)
        return tensor

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor
