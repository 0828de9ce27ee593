"""What the stages share besides the session: the result of a stage and a figure of merit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.session import Session


@dataclass(frozen=True)
class Trained:
    """What a stage's loop hands back. `weights`: whole averaged weights by name on the main worker, else None."""

    weights: dict[str, Tensor] | None
    steps: int
    resumed_from: int
    seconds: float
    checkpoint_stall: float
    first: dict[str, float]
    last: dict[str, float]
    sample_order: str


def trained(session: Session, weights: dict[str, Tensor] | None) -> Trained:
    """Close the session and put its results together."""
    session.close()
    return Trained(
        weights,
        session.step,
        session.resumed_from,
        session.figures.seconds,
        session.stall,
        session.figures.first,
        session.figures.last,
        session.figures.sample_order,
    )


@torch.no_grad()
def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Mean over images of the peak signal-to-noise ratio in dB; values in [-1,1], (B,3,H,W) twice → scalar."""
    error = (image.float().clamp(-1, 1) - truth.float()).square().flatten(1).mean(dim=1)
    return (10.0 * torch.log10(4.0 / error.clamp_min(1e-12))).mean()
