"""The diffusion process on scaled latents: schedule, forward process and conversions between predictions.

z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps, paper eq. (1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config import ScheduleConfig
from pipeline.errors import UserError


class Schedule:
    """betas and abar (cumulative product of 1 - beta), float64; T = config.num_steps. They are looked up on the device
    where they are used, so that no step waits for it."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.betas = (
            torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_steps, dtype=torch.float64) ** 2
        )
        self.abar = torch.cumprod(1.0 - self.betas, dim=0)
        if config.zero_terminal_snr:
            # Lin et al., algorithm 1: the first sqrt(abar) stays, the last becomes 0.
            root = self.abar.sqrt()
            self.abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
            self.betas = 1.0 - self.abar / torch.cat([self.abar.new_ones(1), self.abar[:-1]])
        self._abar_on: dict[torch.device, Tensor] = {}

    def check_t(self, t: Tensor, batch: int | None = None) -> None:
        """`UserError` when t does not hold whole numbers in 0..T-1, one for each of `batch` images if that is given."""
        if t.is_floating_point() or t.dtype == torch.bool:
            raise UserError(f"time steps must be whole numbers, got {t.dtype}")
        if batch is not None and t.shape != (batch,):
            raise UserError(f"t has shape {tuple(t.shape)}; expected one time step an image, ({batch},)")
        if t.numel() and (int(t.min()) < 0 or int(t.max()) >= self.config.num_steps):
            raise UserError(f"time step {int(t.min())}..{int(t.max())} is outside the schedule 0..{len(self.abar) - 1}")

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) for t (B,), shaped (B,1,1,1), in the dtype and on the device of `like`."""
        abar = self._abar_at(t.to(like.device)).reshape(-1, 1, 1, 1)
        return abar.sqrt().to(like), (1.0 - abar).sqrt().to(like)

    def snr(self, t: Tensor) -> Tensor:
        """abar_t / (1 - abar_t) for t (B,), float32 (B,) on the device of t."""
        abar = self._abar_at(t)
        return (abar / (1.0 - abar)).float()

    def _abar_at(self, t: Tensor) -> Tensor:
        if t.device not in self._abar_on:
            self._abar_on[t.device] = self.abar.to(t.device)
        return self._abar_on[t.device][t]

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z0, eps (B,C,h,w), t (B,) → z_t, eq. (1)."""
        signal, noise = self.signal_and_noise(t, z0)
        return signal * z0 + noise * eps

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the denoiser is trained to predict: eps, z0, or v = sqrt(abar) eps - sqrt(1-abar) z0 (Salimans & Ho)."""
        if self.config.prediction == "eps":
            return eps
        if self.config.prediction == "x0":
            return z0
        signal, noise = self.signal_and_noise(t, z0)
        return signal * eps - noise * z0

    def to_x0(self, z_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a prediction implies. All (B,C,h,w)."""
        if self.config.prediction == "x0":
            return prediction
        signal, noise = self.signal_and_noise(t, z_t)
        if self.config.prediction == "v":
            return signal * z_t - noise * prediction
        return (z_t - noise * prediction) / signal

    def to_eps(self, z_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies. All (B,C,h,w)."""
        if self.config.prediction == "eps":
            return prediction
        signal, noise = self.signal_and_noise(t, z_t)
        if self.config.prediction == "v":
            return noise * z_t + signal * prediction
        return (z_t - signal * prediction) / noise


def noisy_condition(condition: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
    """A condition as the denoiser is shown it at a strength s: sqrt(1 - s²)·c + s·noise (`DenoiserConfig`).

    condition (B,C,h,w) scaled, noise standard normal of that shape, strength (B,) in [0, 1); 0 changes nothing."""
    strength = strength.double().reshape(-1, 1, 1, 1)
    kept = (1.0 - strength.square()).sqrt()
    return kept.to(condition) * condition + strength.to(condition) * noise
