import pytest
import torch

from pipeline.config import ScheduleConfig
from pipeline.diffusion import Schedule
from training.losses import alignment_loss, denoising_loss, diffusion_weight, kl_loss, per_sample

SCHEDULE = Schedule(ScheduleConfig(beta_start=1e-4, beta_end=0.015))


def test_per_sample_keeps_the_batch_and_averages_the_rest() -> None:
    a, b = torch.zeros(2, 3, 4, 5), torch.stack([torch.full((3, 4, 5), 2.0), torch.full((3, 4, 5), -3.0)])
    assert per_sample(a, b, "l1").tolist() == [2.0, 3.0]
    assert per_sample(a, b, "l2").tolist() == [4.0, 9.0]


def test_weighted_latent_loss_equals_the_eps_loss() -> None:
    """Eq. (8): w(t)·|z0 - z0_pred|² is |eps - eps_pred|², and so are the means over many t."""
    generator = torch.Generator().manual_seed(0)
    z0, eps, eps_pred = (torch.randn(6, 3, 4, 5, generator=generator) for _ in range(3))
    t = torch.tensor([0, 1, 10, 200, 700, 999])
    z0_pred = SCHEDULE.to_x0(SCHEDULE.add_noise(z0, eps, t), eps_pred, t)
    image = torch.zeros(6, 3, 8, 8)
    weight = diffusion_weight(SCHEDULE.snr(t), "l2")
    _, dm, recon = alignment_loss((z0_pred, z0), (image, image), weight, "l2", 1.0, 1.0)
    torch.testing.assert_close(dm, denoising_loss(eps_pred, eps), rtol=2e-3, atol=0)
    assert recon == 0
    _, dm1, _ = alignment_loss((z0_pred, z0), (image, image), diffusion_weight(SCHEDULE.snr(t), "l1"), "l1", 1.0, 1.0)
    torch.testing.assert_close(dm1, denoising_loss(eps_pred, eps, "l1"), rtol=2e-3, atol=0)


def test_weights_belong_to_their_own_samples() -> None:
    """A weight that broadcast to every sample would give mean(w)·mean(loss)."""
    latent = (torch.zeros(2, 3, 4, 4), torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))
    loss, dm, recon = alignment_loss(latent, latent, torch.tensor([1000.0, 2.0]), "l2", 1.0, 0.5)
    assert float(dm) == pytest.approx(1.0) and float(recon) == pytest.approx(1.0)
    assert float(loss) == pytest.approx(1.5)


def test_clip_bounds_the_weight_before_the_root() -> None:
    snr = SCHEDULE.snr(torch.tensor([0, 999]))
    assert snr[0] > 5000
    assert diffusion_weight(snr, "l2", 5.0).tolist() == pytest.approx([5.0, float(snr[1])])
    assert diffusion_weight(snr, "l1", 4.0).tolist() == pytest.approx([2.0, float(snr[1]) ** 0.5])


def test_kl_is_zero_for_the_standard_normal_and_matches_torch() -> None:
    moments = torch.zeros(2, 6, 3, 4)
    assert kl_loss(moments) == 0
    moments = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(1))
    mean, log_variance = moments.chunk(2, dim=1)
    reference = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_loss(moments), reference.flatten(1).sum(1).mean())
