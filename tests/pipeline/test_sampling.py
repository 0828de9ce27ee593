"""Samplers run the steps they are asked for and land where an exact denoiser says they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import relative_error
from torch import Tensor

from pipeline.config import ScheduleConfig
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.sampling import SeededNoise, ddim, ddim_timesteps, dpm_solver, dpm_timesteps

PREDICTIONS = ["eps", "x0", "v"]
MEAN, STD = 0.8, 0.5


def schedule_of(prediction: Any = "eps") -> Schedule:
    return Schedule(ScheduleConfig(beta_start=0.0015, beta_end=0.0155, prediction=prediction))


class GaussianDenoiser:
    """The exact prediction for data that is normal with MEAN and STD; counts its calls and keeps the time steps."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.steps = schedule, list[int]()

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(z),) and t.dtype == torch.int64 and len(t.unique()) == 1
        self.steps.append(int(t[0]))
        abar = self.schedule.abar[t].reshape(-1, 1, 1, 1)
        # eps = -sqrt(1 - abar) × score of N(sqrt(abar) MEAN, abar STD² + 1 - abar)
        eps = (1 - abar).sqrt() * (z - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)
        x0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
        return self.schedule.target(x0, eps, t)


def exact_flow(schedule: Schedule, z: Tensor, t: int, abar_end: float) -> Tensor:
    """Where the probability flow carries z from time step t: (z - mean) / std stays constant along it."""

    def moments(abar: float) -> tuple[float, float]:
        return abar**0.5 * MEAN, (abar * STD**2 + 1 - abar) ** 0.5

    (mean, std), (mean_end, std_end) = moments(float(schedule.abar[t])), moments(abar_end)
    return mean_end + std_end * (z - mean) / std


def start(num: int = 2) -> Tensor:
    return torch.randn(num, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- time steps -------------------------------------------------------------------------------------------------------


def test_every_step_count_runs_that_many_distinct_steps() -> None:
    for num_steps in range(1, 1001):
        steps = ddim_timesteps(num_steps)
        assert len(steps) == num_steps == len(set(steps)) and steps == sorted(steps)
        assert steps[0] >= 0 and steps[-1] <= 999
        # Evenly spread: no gap is more than one step off the even spacing, and the noisiest is not dropped.
        assert all(abs((b - a) - 1000 / num_steps) < 1 for a, b in zip(steps, steps[1:]))
        assert steps[-1] >= 1000 - 1000 / num_steps
        if num_steps < 1000 and 1000 % num_steps == 0:
            assert steps == [t + 1 for t in range(0, 1000, 1000 // num_steps)]


@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 10, 15, 50, 299, 333, 667, 999, 1000])
def test_the_denoiser_is_called_once_a_step(sampler: Any, num_steps: int) -> None:
    schedule = schedule_of()
    denoiser = GaussianDenoiser(schedule)
    seen: list[tuple[int, int]] = []
    z = sampler(
        denoiser, schedule, start(), num_steps=num_steps, on_step=lambda done, total, x0: seen.append((done, total))
    )
    assert bool(torch.isfinite(z).all())
    assert len(denoiser.steps) == num_steps == len(set(denoiser.steps))
    assert denoiser.steps == sorted(denoiser.steps, reverse=True) and min(denoiser.steps) >= 0
    assert seen == [(i + 1, num_steps) for i in range(num_steps)]
    if sampler is ddim:
        assert denoiser.steps[::-1] == ddim_timesteps(num_steps)
    else:
        assert denoiser.steps[0] == 999


def test_dpm_solver_steps_for_every_count() -> None:
    for schedule in (schedule_of(), Schedule(ScheduleConfig(beta_start=1e-4, beta_end=0.02))):
        for num_steps in range(1, 1001):
            steps = dpm_timesteps(num_steps, schedule)
            assert len(steps) == num_steps == len(set(steps)) and steps == sorted(steps, reverse=True)
            assert steps[0] == 999 and (num_steps == 1 or steps[-1] == 0)


def test_dpm_solver_steps_are_even_in_log_snr() -> None:
    schedule = schedule_of()
    log_snr = schedule.snr(torch.tensor(dpm_timesteps(12, schedule))).log()
    gaps = log_snr.diff()
    # At the clean end a whole time step is as wide as a few tenths in log-SNR.
    assert float(gaps[:-3].max() - gaps[:-3].min()) < 0.1 and float(gaps.max() / gaps.min()) < 1.6


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_step_counts_outside_the_schedule(sampler: Any, num_steps: int) -> None:
    with pytest.raises(UserError, match="num_steps"):
        sampler(GaussianDenoiser(schedule_of()), schedule_of(), start(), num_steps=num_steps)


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_converges_to_the_exact_flow(prediction: str) -> None:
    schedule = schedule_of(prediction)
    z = start()
    errors = []
    for num_steps in (10, 100, 1000):
        last = ddim_timesteps(num_steps)[-1]
        end = float(schedule.abar[0]) if num_steps < 1000 else 1.0
        ours = ddim(GaussianDenoiser(schedule), schedule, z, num_steps=num_steps)
        errors.append(relative_error(ours, exact_flow(schedule, z, last, end)))
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4 and errors[2] < 5e-3, errors


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpm_solver_converges_to_the_exact_flow_and_to_ddim(prediction: str) -> None:
    schedule = schedule_of(prediction)
    z = start()
    exact = exact_flow(schedule, z, 999, 1.0)
    errors = [
        relative_error(dpm_solver(GaussianDenoiser(schedule), schedule, z, num_steps=n), exact) for n in (5, 10, 20)
    ]
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 2 and errors[2] < 4e-3, errors
    ddim_end = ddim(GaussianDenoiser(schedule), schedule, z, num_steps=1000)
    assert relative_error(dpm_solver(GaussianDenoiser(schedule), schedule, z, num_steps=200), ddim_end) < 6e-3


def test_predictions_agree_step_by_step() -> None:
    """The same exact denoiser expressed as eps, x0 or v gives the same samples."""
    for sampler in (ddim, dpm_solver):
        ends = []
        for prediction in PREDICTIONS:
            schedule = schedule_of(prediction)
            ends.append(sampler(GaussianDenoiser(schedule), schedule, start(), num_steps=17))  # type: ignore[operator]
        assert relative_error(ends[1], ends[0]) < 1e-5 and relative_error(ends[2], ends[0]) < 1e-5


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_draws_the_data_s_distribution(eta: float) -> None:
    """The noise that a step adds makes up for what it takes away when the denoiser is exact."""
    schedule = schedule_of()
    shape = (1, 80, 80)
    noise = SeededNoise([5], shape)
    z = noise(dtype=torch.float64)
    end = ddim(GaussianDenoiser(schedule), schedule, z, num_steps=250, eta=eta, noise=noise)
    abar = float(schedule.abar[0])
    assert float(end.mean()) == pytest.approx(abar**0.5 * MEAN, abs=0.03)
    assert float(end.std()) == pytest.approx((abar * STD**2 + 1 - abar) ** 0.5, rel=0.05)
    assert relative_error(end, ddim(GaussianDenoiser(schedule), schedule, z, num_steps=250)) > 0.1


def test_perfect_noise_gives_back_x0() -> None:
    x0, eps = start(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    t = torch.tensor([0, 999])
    for prediction in PREDICTIONS:
        schedule = schedule_of(prediction)
        z_t = schedule.add_noise(x0, eps, t)
        target = schedule.target(x0, eps, t)
        assert torch.allclose(schedule.to_x0(z_t, target, t), x0, atol=1e-9)
        assert torch.allclose(schedule.to_eps(z_t, target, t), eps, atol=1e-9)


def test_v_is_the_published_one() -> None:
    """v = alpha eps - sigma x0 (Salimans & Ho 2022), at a step where both are known."""
    schedule = schedule_of("v")
    t = torch.tensor([500])
    signal, noise = float(schedule.abar[500]) ** 0.5, float(1 - schedule.abar[500]) ** 0.5
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert float(schedule.target(2 * one, 3 * one, t)) == pytest.approx(signal * 3 - noise * 2)


def test_schedule_numbers() -> None:
    schedule = schedule_of()
    assert float(schedule.betas[0]) == pytest.approx(0.0015) and float(schedule.betas[-1]) == pytest.approx(0.0155)
    middle = ((0.0015**0.5 + 0.0155**0.5) / 2) ** 2
    assert float(schedule.betas[499] + schedule.betas[500]) / 2 == pytest.approx(middle, rel=1e-5)
    assert float(schedule.snr(torch.tensor([0]))) == pytest.approx((1 - 0.0015) / 0.0015, rel=1e-5)


# --- noise and batches ------------------------------------------------------------------------------------------------


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    together, alone = SeededNoise([3, 4, 5], (3, 4, 6)), SeededNoise([4], (3, 4, 6))
    for _ in range(3):
        assert torch.equal(together()[1:2], alone())


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpm++", 0.0)])
def test_a_sample_does_not_depend_on_its_batch(small: LatentZoom, sampler: Any, eta: float) -> None:
    together = small.sample_latents(num=3, seed=7, sampler=sampler, num_steps=4, eta=eta)
    alone = small.sample_latents(num=1, seed=8, sampler=sampler, num_steps=4, eta=eta)
    assert relative_error(alone[0], together[1]) < 1e-4
    assert relative_error(together[0], together[1]) > 0.1


def test_eta_is_used(small: LatentZoom) -> None:
    noise = torch.randn(1, 3, 8, 8)
    plain = small.sample_latents(noise, num_steps=4, eta=0.0)
    assert torch.equal(plain, small.sample_latents(noise, num_steps=4, eta=0.0, seed=1))
    assert relative_error(small.sample_latents(noise, num_steps=4, eta=1.0), plain) > 0.01


def test_given_noise_decides_the_latent_s_size(small: LatentZoom) -> None:
    """With eta > 0 too, where more noise of that size is drawn."""
    assert small.sample_latents(torch.randn(2, 3, 4, 12), num_steps=3, eta=1.0).shape == (2, 3, 4, 12)


def test_bad_input() -> None:
    schedule = schedule_of()
    with pytest.raises(UserError, match="eta = -1"):
        ddim(GaussianDenoiser(schedule), schedule, start(), num_steps=3, eta=-1)
    with pytest.raises(UserError, match="needs a source of noise"):
        ddim(GaussianDenoiser(schedule), schedule, start(), num_steps=3, eta=1)
    for t in (torch.tensor([1000]), torch.tensor([-1]), torch.tensor([3, 1000])):
        with pytest.raises(UserError, match="outside the schedule"):
            schedule.check_t(t)
