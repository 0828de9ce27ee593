"""The patch-GAN discriminator of stage 0 with its own optimizer (Isola et al., CVPR 2017; hinge loss).

It is small, so every worker holds it whole; gradients are averaged over the workers by hand.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import AutoencoderStage
from training.losses import generator_loss, hinge_discriminator_loss
from training.not_finite import skip_unless_finite
from training.optim import is_fused
from training.snapshots import CpuCopies
from training.world import World


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches: image (B,3,H,W) → (B,1,h',w'). GroupNorm, so that a batch of one works."""

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, num_layers + 1):
            out, stride = width * min(2**layer, 8), 2 if layer < num_layers else 1
            layers += [nn.Conv2d(channels, out, 4, stride=stride, padding=1), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]
            channels = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class Adversary:
    """Discriminator, optimizer and state. `opinion` is the autoencoder's loss term; `backward`, `step` train it."""

    def __init__(self, config: AutoencoderStage, world: World) -> None:
        self.world, self._copies = world, CpuCopies()
        torch.manual_seed(config.seed + 1)
        self.network = PatchDiscriminator().to(world.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, betas=(0.5, 0.9), weight_decay=0.0, fused=is_fused(world.device)
        )

    def opinion(self, made: Tensor) -> Tensor:
        """How far the discriminator is from taking `made` for real: scalar with gradient to `made` only."""
        self.network.requires_grad_(False)
        loss = generator_loss(self.network(made))
        self.network.requires_grad_(True)
        return loss

    def backward(self, real: Tensor, made: Tensor, accumulation: int) -> None:
        """Add the discriminator's own gradient."""
        (hinge_discriminator_loss(self.network(real), self.network(made)) / accumulation).backward()

    def step(self) -> None:
        """Average the gradients over the workers and update the discriminator, where they are finite."""
        if self.world.size > 1:
            for parameter in self.network.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world.size
        grads = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        skip_unless_finite(self.optimizer, nn.utils.get_total_norm(grads))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return self._copies.take({"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        optimizer = state["optimizer"]  # older ones were not fused
        groups = [{**group, "fused": self.optimizer.defaults["fused"]} for group in optimizer["param_groups"]]
        self.optimizer.load_state_dict({**optimizer, "param_groups": groups})
