"""The first stage as one forward pass: what stage 0 trains.

Legend: B batch, C latent channels, H/W pixels, h/w latent cells.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.autoencoder import Autoencoder, posterior_sample
from pipeline.bundle import build_autoencoder, build_decoder
from pipeline.config import ModelConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.geometry import Size, Window


class Reconstruction(nn.Module):
    """The autoencoder as one forward pass, which is what an engine trains."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self._given: list[Tensor] = []
        # Once for all: what is hooked on and off in every pass cannot be compiled.
        autoencoder.decoder.conv_out.register_forward_pre_hook(self._watch)

    def _watch(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._given[:] = [inputs[0].detach()]

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image (B,3,H,W) in [-1,1], noise (B,C,h,w) → reconstruction (B,3,H,W); what the regulariser looks at: "kl"
        the moments (B,2C,h,w), "vq" the codebook loss (scalar); and, without gradient, what the decoder's last layer, a
        3×3 convolution, was given (B,ch,H,W)."""
        model = self.autoencoder
        stored = model.moments(image).float()
        if model.config.kind == "vq":
            latent, regulariser = model.quantize(stored)
        else:
            latent, regulariser = posterior_sample(stored, noise), stored
        made = model.decoder(model.post_quant_conv(latent.to(noise.dtype)))
        return made, regulariser, self._given.pop()


class JointFirstStage(nn.Module):
    """Encoder and implicit decoder as one forward pass, which is what an engine trains."""

    def __init__(self, autoencoder: Autoencoder, decoder: ImplicitDecoder) -> None:
        super().__init__()
        self.autoencoder, self.decoder = autoencoder, decoder

    def forward(self, image: Tensor, noise: Tensor, size: Size, window: Window) -> tuple[Tensor, Tensor]:
        """image (B,3,H,W) in [-1,1], noise (B,C,h,w) → the window of ND(sample of the posterior; size), and the moments
        (B,2C,h,w)."""
        moments = self.autoencoder.moments(image).float()
        return self.decoder(posterior_sample(moments, noise).to(noise.dtype), size, window), moments


def joint_first_stage(model: ModelConfig) -> JointFirstStage:
    """The network that is trained: encoder without convolutional decoder, and implicit decoder."""
    return JointFirstStage(build_autoencoder(model, has_decoder=False), build_decoder(model))
