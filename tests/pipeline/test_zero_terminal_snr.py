"""Schedules that end in noise alone (Lin et al., WACV 2024), and sampling from there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import ScheduleConfig
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from pipeline.sampling import ddim, ddim_timesteps, dpm_solver, dpm_timesteps

PLAIN = ScheduleConfig(prediction="v")
ZERO = dataclasses.replace(PLAIN, zero_terminal_snr=True)


def test_the_last_step_is_noise_alone_and_the_first_is_kept() -> None:
    plain, zero = Schedule(PLAIN), Schedule(ZERO)
    assert float(zero.abar[-1]) == 0 and float(zero.snr(torch.tensor([999]))) == 0
    assert float(zero.abar[0]) == pytest.approx(float(plain.abar[0]), rel=1e-12)
    assert bool((zero.abar.diff() < 0).all())
    torch.testing.assert_close(torch.cumprod(1 - zero.betas, 0), zero.abar, rtol=1e-9, atol=1e-15)
    z0, eps, t = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.tensor([999])
    assert torch.equal(zero.add_noise(z0, eps, t), eps) and torch.equal(zero.target(z0, eps, t), -z0)
    assert not torch.equal(plain.add_noise(z0, eps, t), eps)


def test_the_schedule_is_diffusers_one() -> None:
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    theirs = rescale_zero_terminal_snr(Schedule(PLAIN).betas)
    torch.testing.assert_close(Schedule(ZERO).betas, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_every_prediction_gives_back_z0_and_eps_at_every_step(prediction: str) -> None:
    schedule = Schedule(dataclasses.replace(ZERO, prediction=prediction))  # type: ignore[arg-type]
    t = torch.tensor([0, 500, 998, 999])
    z0, eps = (torch.randn(4, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    z_t, target = schedule.add_noise(z0, eps, t), schedule.target(z0, eps, t)
    torch.testing.assert_close(schedule.to_x0(z_t, target, t), z0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.to_eps(z_t, target, t), eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 20, 50, 1000])
def test_sampling_begins_at_the_last_step(num_steps: int) -> None:
    steps = ddim_timesteps(num_steps, trailing=True)
    assert len(set(steps)) == num_steps and steps == sorted(steps) and steps[-1] == 999 and steps[0] >= 0
    assert dpm_timesteps(num_steps, Schedule(ZERO)) == steps[::-1]
    if 1000 % num_steps == 0:  # diffusers' "trailing"
        assert steps[::-1] == [int(n) - 1 for n in np.round(np.arange(1000, 0, -1000 / num_steps))]


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("num_steps", [1, 20])
def test_a_perfect_model_of_one_grey_level_gives_exactly_that_level(sampler: str, num_steps: int) -> None:
    """Lin et al.'s flaw: with signal left in the last step, a model learns that the start's mean is the picture's, so
    pure noise leads to medium brightness. The optimum for pictures that all are grey 2.5: v from z_t by algebra."""
    schedule = Schedule(ZERO)
    level = torch.full((2, 3, 4, 4), 2.5)

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        signal, noise = schedule.signal_and_noise(t, z_t)
        return signal * (z_t - signal * level) / noise - noise * level

    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    if sampler == "ddim":
        made = ddim(predict, schedule, z, num_steps=num_steps)
    else:
        made = dpm_solver(predict, schedule, z, num_steps=num_steps)
    # DDIM's last step lands on abar_0, as in the paper: a little noise is left.
    torch.testing.assert_close(made, level, rtol=0, atol=0.2 if sampler == "ddim" else 2e-3)
    assert float((made - level).mean().abs()) < 0.02


def test_brightness_that_only_the_start_could_tell_is_not_lost() -> None:
    """The best linear denoiser of pictures whose level is N(0, 3²): with the plain schedule the start's own mean leaks
    into the picture; here the level is independent of the start's mean."""
    leaks = {}
    for config in (PLAIN, ZERO):
        schedule = Schedule(config)
        t = torch.tensor([999])
        signal, noise = (float(x) for x in schedule.signal_and_noise(t, torch.zeros(1, 1, 1, 1)))
        # E[level | mean of z_T] for 4 096 cells, whose noise averages out
        leaks[config.zero_terminal_snr] = signal * 9 / (signal**2 * 9 + noise**2 / 4096)
    assert leaks[True] == 0 and leaks[False] > 1


def test_bad_settings() -> None:
    with pytest.raises(UserError, match=r"schedule.prediction = 'eps' .* 'v' or 'x0' with schedule.zero_terminal_snr"):
        ScheduleConfig(zero_terminal_snr=True)
    with pytest.raises(UserError, match="at least 2 with zero_terminal_snr"):
        ScheduleConfig(zero_terminal_snr=True, prediction="v", num_steps=1)
