"""The frozen autoencoder: image ↔ latent (the first stage of latent diffusion, Rombach et al., CVPR 2022).

Legend: B batch, H/W pixels, h/w latent cells (H = f·h), C latent channels.
Images are in [-1, 1]; latents here are *unscaled* (the denoiser's are multiplied by the model's scale_factor).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from pipeline.config import AutoencoderConfig
from pipeline.errors import UserError
from pipeline.quantizer import Quantizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import Decoder, Encoder


class Autoencoder(nn.Module):
    """Encoder and convolutional decoder. A first stage without a convolutional decoder has `has_decoder` False. The
    kind "identity" has no weights: encoding and decoding change nothing."""

    def __init__(self, config: AutoencoderConfig, *, has_decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.has_decoder = has_decoder
        if config.kind == "identity":
            self.encoder, self.decoder = cast("Encoder", nn.Identity()), cast("Decoder", nn.Identity())
            self.quant_conv, self.post_quant_conv = (cast(nn.Conv2d, nn.Identity()) for _ in range(2))
            return
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        levels = len(config.width_mult)
        attends = [level in config.attention_levels for level in range(levels)]
        self.encoder = Encoder(
            in_channels=3,
            out_channels=config.latent_channels,
            down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
            block_out_channels=config.widths,
            layers_per_block=config.num_res_blocks,
            norm_num_groups=config.norm_groups,
            double_z=config.kind == "kl",
            mid_block_add_attention=config.mid_attention,
        )
        self.quant_conv = nn.Conv2d(config.stored_channels, config.stored_channels, 1)
        if not has_decoder:
            return
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(
            in_channels=config.latent_channels,
            out_channels=3,
            up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
            block_out_channels=config.widths,
            layers_per_block=config.num_res_blocks,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=config.mid_attention,
        )
        if config.kind == "vq":
            self.quantizer = Quantizer(config.num_embeddings, config.latent_channels)

    def moments(self, image: Tensor) -> Tensor:
        """Image (B,3,H,W) in [-1,1] → what the cache stores: "kl" (B,2C,h,w) mean | log-variance, "vq" (B,C,h,w)
        continuous, before quantisation, "identity" the image. H and W must be multiples of f (else `UserError`)."""
        factor = self.config.factor
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape or any(n % factor for n in image.shape[2:]):
            raise UserError(
                f"image of shape {tuple(image.shape)} cannot be encoded; it must be (B, 3, H, W) with H and W "
                f"multiples of {factor}"
            )
        return self.quant_conv(self.encoder(image))

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Image (B,3,H,W) in [-1,1] → unscaled latent (B,C,h,w); "kl": the mean, or a sample given a generator."""
        return latent_of(self.moments(image), self.config, generator)

    def decode(self, latent: Tensor) -> Tensor:
        """Unscaled latent (B,C,h,w) → image (B,3,H,W), about [-1,1]; "vq" quantises first."""
        if not self.has_decoder:
            raise UserError("this autoencoder was saved without its convolutional decoder; use the implicit decoder")
        if self.config.kind == "vq":
            latent = self.quantize(latent)[0].to(latent.dtype)
        return self.decoder(self.post_quant_conv(latent))

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """ "vq" only: nearest codes (straight-through gradient) and the codebook loss, both at least float32."""
        return self.quantizer(latent)

    def identity(self) -> str:
        """SHA-256 (hex) of the part that latents depend on: configuration, encoder and quant_conv weights."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                data = tensor.detach().to("cpu", torch.float32).contiguous()
                digest.update(f"{name}{tuple(data.shape)}".encode())
                digest.update(data.numpy().tobytes())
        return digest.hexdigest()


def latent_of(stored: Tensor, config: AutoencoderConfig, generator: torch.Generator | None = None) -> Tensor:
    """A stored latent (B,S,h,w) → unscaled latent (B,C,h,w). "kl": the mean, or a sample if a generator is given."""
    if stored.shape[1] != config.stored_channels:
        raise UserError(f"stored latent has {stored.shape[1]} channels, expected {config.stored_channels}")
    if config.kind != "kl":
        return stored
    mean = stored.chunk(2, dim=1)[0]
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=generator.device).to(mean.device)
    return posterior_sample(stored, noise)


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """A sample of q(z|x) of a KL autoencoder: moments (B,2C,h,w), mean | log-variance, and standard normal noise
    (B,C,h,w) → (B,C,h,w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
