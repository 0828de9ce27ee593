"""Drawing latents: DDIM (Song et al., ICLR 2021, eq. 12) and DPM-Solver++ (Lu et al., 2022, through diffusers).

Every image has its own seed and generator, so a sample does not depend on the batch it is drawn in. Noise is drawn on
the CPU, so it does not depend on the device either. Latents here are *scaled*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.diffusion import Schedule
from pipeline.errors import UserError

Sampler = Literal["ddim", "dpm++"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""(z_t (B,C,h,w), t (B,) int64) → the denoiser's prediction (B,C,h,w)."""
OnStep = Callable[[int, int, Tensor], None]
"""Called after each step with (steps done, steps in all, x0_pred (B,C,h,w) scaled)."""


class SeededNoise:
    """Independent standard normal noise for each image of a batch: image i draws from a generator seeded seeds[i], from
    0 to 2^63 - 1 (`UserError` otherwise)."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int]) -> None:
        for seed in seeds:
            if not 0 <= int(seed) < 1 << 63:
                raise UserError(f"seed {seed} is not allowed; use 0 to {(1 << 63) - 1}")
        self.shape = shape
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The next noise, (len(seeds), *shape)."""
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])
        return noise.to(device=device, dtype=dtype)


def ddim_timesteps(num_steps: int, schedule_steps: int = 1000, *, trailing: bool = False) -> list[int]:
    """`num_steps` time steps, ascending. Where num_steps divides T this is the paper's arange(0, T, T/num_steps) + 1;
    in between the same spacing, rounded down; at num_steps = T all of 0..T-1. trailing: the same spacing counted down
    from T-1, which is among them then (Lin et al., WACV 2024, table 2). Raises `UserError` outside 1..T."""
    if not 1 <= num_steps <= schedule_steps:
        raise UserError(f"num_steps = {num_steps} is not allowed; use 1 to {schedule_steps}")
    if trailing:
        return [-(-(i + 1) * schedule_steps // num_steps) - 1 for i in range(num_steps)]
    shift = 0 if num_steps == schedule_steps else 1
    return [i * schedule_steps // num_steps + shift for i in range(num_steps)]


def ddim(
    predict: Predict,
    schedule: Schedule,
    z: Tensor,
    *,
    num_steps: int,
    eta: float = 0.0,
    noise: SeededNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """From z at the noisiest step (B,C,h,w) to the clean latent, in exactly `num_steps` evaluations. The last step
    lands on abar_0, as in the paper. eta > 0 adds noise from `noise`."""
    if not 0 <= eta < math.inf:
        raise UserError(f"eta = {eta} is not allowed; use 0 or more")
    if eta > 0 and noise is None:
        raise UserError("DDIM with eta > 0 needs a source of noise")
    steps = ddim_timesteps(num_steps, schedule.config.num_steps, trailing=schedule.config.zero_terminal_snr)
    for done, i in enumerate(reversed(range(num_steps)), start=1):
        t = torch.full((z.shape[0],), steps[i], dtype=torch.int64, device=z.device)
        abar = float(schedule.abar[steps[i]])
        abar_prev = float(schedule.abar[steps[i - 1]]) if i > 0 else _final_abar(schedule, steps[0])
        prediction = predict(z, t)
        x0_pred = schedule.to_x0(z, prediction, t)
        eps_pred = schedule.to_eps(z, prediction, t)
        sigma = eta * ((1 - abar_prev) / (1 - abar) * max(1 - abar / abar_prev, 0.0)) ** 0.5
        z = abar_prev**0.5 * x0_pred + max(1 - abar_prev - sigma**2, 0.0) ** 0.5 * eps_pred
        if sigma > 0:
            assert noise is not None
            z = z + sigma * noise(z.device, z.dtype)
        if on_step is not None:
            on_step(done, num_steps, x0_pred)
    return z


def _final_abar(schedule: Schedule, first_step: int) -> float:
    """What the last DDIM step lands on: abar_0, or 1 when the step itself starts at t = 0."""
    return float(schedule.abar[0]) if first_step > 0 else 1.0


def one_step(predict: Predict, schedule: Schedule, z: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """A distilled denoiser's only evaluation: z at the noisiest step (B,C,h,w) → the clean latent that it predicts."""
    t = torch.full((z.shape[0],), schedule.config.num_steps - 1, dtype=torch.int64, device=z.device)
    x0_pred = schedule.to_x0(z, predict(z, t), t)
    if on_step is not None:
        on_step(1, 1, x0_pred)
    return x0_pred


def dpm_timesteps(num_steps: int, schedule: Schedule) -> list[int]:
    """`num_steps` distinct time steps, descending from T-1 (to 0 when there is more than one), evenly spaced in
    log-SNR, the variable that the solver is a polynomial in. A schedule that ends in noise alone has no finite log-SNR
    there, so it takes DDIM's trailing steps. Raises `UserError` outside 1..T."""
    total = schedule.config.num_steps
    if schedule.config.zero_terminal_snr:
        return ddim_timesteps(num_steps, total, trailing=True)[::-1]
    if not 1 <= num_steps <= total:
        raise UserError(f"num_steps = {num_steps} is not allowed; use 1 to {total}")
    log_snr = (schedule.abar / (1.0 - schedule.abar)).log().flip(0)  # ascending
    targets = torch.linspace(float(log_snr[0]), float(log_snr[-1]), num_steps, dtype=torch.float64)
    upper = torch.searchsorted(log_snr, targets).clamp(1 if total > 1 else 0, total - 1)
    lower = (upper - 1).clamp(min=0)
    nearest = torch.where(targets - log_snr[lower] < log_snr[upper] - targets, lower, upper)
    # Many steps crowd at the noisy end, where the log-SNR falls fast: spread them to distinct neighbours.
    steps: list[int] = []
    for i, position in enumerate(nearest.tolist()):
        earliest = steps[-1] + 1 if steps else 0
        steps.append(min(max(position, earliest), total - num_steps + i))
    return [total - 1 - step for step in steps]


def dpm_solver(
    predict: Predict, schedule: Schedule, z: Tensor, *, num_steps: int, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++(2M), deterministic: z at the noisiest step (B,C,h,w) → clean latent in `num_steps` evaluations."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=schedule.config.num_steps,
        trained_betas=schedule.betas.numpy(),
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[schedule.config.prediction],
        final_sigmas_type="zero",
        rescale_betas_zero_snr=schedule.config.zero_terminal_snr,  # they are: this only bounds the last step's log-SNR
    )
    solver.set_timesteps(timesteps=dpm_timesteps(num_steps, schedule))
    for done, step in enumerate(solver.timesteps, start=1):
        t = torch.full((z.shape[0],), int(step), dtype=torch.int64, device=z.device)
        prediction = predict(z, t)
        if on_step is not None:
            on_step(done, num_steps, schedule.to_x0(z, prediction, t))
        z = solver.step(prediction, step, z).prev_sample
    return z
