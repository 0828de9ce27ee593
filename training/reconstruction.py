"""The first stage as one forward pass: what stage 0 trains.

Legend: B batch, C latent channels, H/W pixels, h/w latent cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.autoencoder import Autoencoder
from pipeline.bundle import build_autoencoder, build_decoder
from pipeline.config import ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.geometry import Size, Window


class Reconstruction(nn.Module):
    """The autoencoder as one forward pass, which is what an engine trains."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """image (B,3,H,W) in [-1,1], noise (B,C,h,w) → reconstruction (B,3,H,W) and what the regulariser looks at:
        "kl" the moments (B,2C,h,w), "vq" the codebook loss (scalar)."""
        model = self.autoencoder
        stored = model.moments(image)
        if model.config.kind == "vq":
            latent, regulariser = model.quantize(stored)
        else:
            mean, log_variance = stored.chunk(2, dim=1)
            latent = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
            regulariser = stored
        return model.decoder(model.post_quant_conv(latent)), regulariser


class JointFirstStage(nn.Module):
    """Encoder and implicit decoder as one forward pass, which is what an engine trains."""

    def __init__(self, autoencoder: Autoencoder, decoder: ImplicitDecoder) -> None:
        super().__init__()
        self.autoencoder, self.decoder = autoencoder, decoder

    def forward(self, image: Tensor, noise: Tensor, size: Size, window: Window) -> tuple[Tensor, Tensor]:
        """image (B,3,H,W) in [-1,1], noise (B,C,h,w) → the window of ND(sample of the posterior; size), and the moments
        (B,2C,h,w)."""
        moments = self.autoencoder.moments(image)
        mean, log_variance = moments.chunk(2, dim=1)
        latent = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        return self.decoder(latent, size, window), moments


def joint_first_stage(model: ModelConfig) -> JointFirstStage:
    """The network that is trained: encoder without convolutional decoder, and implicit decoder."""
    return JointFirstStage(build_autoencoder(model, has_decoder=False), build_decoder(model))
