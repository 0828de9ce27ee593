"""Losses of the stages as plain functions, and the figure of merit beside them.

Legend: B batch, C channels, H/W pixels, h/w latent cells. Every "per sample" value has shape (B,): weights multiply
sample by sample before the mean over the batch is taken.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

Kind = Literal["l1", "l2"]


def per_sample(prediction: Tensor, target: Tensor, kind: Kind) -> Tensor:
    """Mean absolute ("l1") or squared ("l2") error of each sample: (B, ...) twice → (B,)."""
    assert prediction.shape == target.shape, (prediction.shape, target.shape)
    difference = prediction.float() - target.float()
    error = difference.abs() if kind == "l1" else difference.square()
    return error.flatten(1).mean(dim=1)


def diffusion_weight(snr: Tensor, kind: Kind, clip: float = 0.0) -> Tensor:
    """w(t) of paper eqs. (7) and (8) for signal-to-noise ratios abar/(1-abar), shape (B,) → (B,).

    "l2" takes w, "l1" its square root, since the errors are not squared. `clip` > 0 bounds w from above before the
    root is taken: unbounded, w is 1e4 at t = 0 and 1e-4 at t = T, and the few cleanest steps are all that is learned.
    """
    weight = snr.clamp(max=clip) if clip > 0 else snr
    return weight.sqrt() if kind == "l1" else weight


def min_snr_weight(snr: Tensor, prediction: str, gamma: float, kind: Kind = "l2") -> Tensor:
    """Min-SNR-gamma weights (Hang et al., ICCV 2023, section 3.4) for signal-to-noise ratios (B,) → (B,).

    The error of z0_pred has the weight min(SNR, gamma), whatever is predicted; an error of eps is SNR^-1, one of v
    (SNR + 1)^-1 of that. "l1" takes the root, since its errors are not squared.
    """
    share = {"x0": torch.ones_like(snr), "eps": 1.0 / snr, "v": 1.0 / (snr + 1.0)}[prediction]
    weight = snr.clamp(max=gamma) * share
    return weight.sqrt() if kind == "l1" else weight


def denoising_loss(prediction: Tensor, target: Tensor, kind: Kind = "l2", weight: Tensor | None = None) -> Tensor:
    """Paper eq. (4): mean error of the denoiser's prediction, (B,C,h,w) twice → scalar. weight (B,): of the samples."""
    errors = per_sample(prediction, target, kind)
    return errors.mean() if weight is None else (weight * errors).mean()


def alignment_loss(
    latent: tuple[Tensor, Tensor],
    image: tuple[Tensor, Tensor],
    weight: Tensor,
    kind: Kind,
    lambda_dm: float,
    lambda_recon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Paper eq. (9): lambda_dm · L_dm + lambda_recon · L_recon → (loss, L_dm, L_recon), scalars.

    latent: (prediction, truth), (B,C,h,w) each, eq. (8). image: (rendering, truth), (B,3,H,W) each, eq. (7).
    weight: w(t), (B,), from `diffusion_weight`.
    """
    dm = (weight * per_sample(*latent, kind)).mean()
    recon = (weight * per_sample(*image, kind)).mean()
    return lambda_dm * dm + lambda_recon * recon, dm, recon


def kl_loss(moments: Tensor) -> Tensor:
    """Divergence of N(mean, exp(logvar)) from N(0, 1), summed over a latent and averaged over the batch.

    moments (B,2C,h,w): mean | log-variance.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return divergence.flatten(1).sum(dim=1).mean()


def adaptive_weight(reconstruction: Tensor, generator: Tensor, made: Tensor, features: Tensor, unit: float) -> Tensor:
    """Weight (scalar, without gradient) that gives the generator's loss the same gradient at the decoder's last layer
    as the reconstruction: |d reconstruction| / (|d generator| + 1e-4), at most 1e4 (Esser et al., "Taming", CVPR 2021,
    eq. 7; LDM's loss). Both losses are scalars of `made` (B,3,H,W); features (B,ch,H,W): the last layer's input.

    unit: `training.config.first_stage_unit`; the bound holds for LDM's sum, so that here it is 1e4 / unit. The layer's
    gradient is made from that of `made`, since the network's own weights may be spread over workers.
    """

    def length(loss: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(loss, made, retain_graph=True)
        shape = (made.shape[1], features.shape[1], 3, 3)
        return conv2d_weight(features.float(), shape, slope.float(), padding=1).norm()

    weight = unit * length(reconstruction) / (length(generator) + 1e-4)
    return weight.clamp(0.0, 1e4).detach() / unit


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Patch-GAN discriminator, hinge form: scores (B,1,h,w) of real and of made images → scalar."""
    return 0.5 * (torch.relu(1.0 - real.float()).mean() + torch.relu(1.0 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss: scores of made images (B,1,h,w) → scalar."""
    return -fake.float().mean()


@torch.no_grad()
def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Mean over images of the peak signal-to-noise ratio in dB; values in [-1,1], (B,3,H,W) twice → scalar."""
    error = (image.float().clamp(-1, 1) - truth.float()).square().flatten(1).mean(dim=1)
    return (10.0 * torch.log10(4.0 / error.clamp_min(1e-12))).mean()
