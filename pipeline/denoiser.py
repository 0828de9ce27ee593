"""The denoiser eps_theta: LDM's U-Net from diffusers blocks. Latents here are *scaled*."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config import DenoiserConfig
from pipeline.errors import UserError


class Denoiser(nn.Module):
    """U-Net on latents; for SR the condition latent is concatenated to its input (condition_channels > 0)."""

    def __init__(self, config: DenoiserConfig, latent_channels: int, condition_channels: int = 0) -> None:
        super().__init__()
        # Imported here: a model without a denoiser starts in half the time.
        from diffusers.models.attention_processor import Attention
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.unets.unet_2d import UNet2DModel

        self.config = config
        self.latent_channels, self.condition_channels = latent_channels, condition_channels
        attends = [2**level in config.attention_factors for level in range(len(config.width_mult))]
        plain_down, plain_up = (
            ("DownBlock2D", "UpBlock2D")
            if config.resample == "conv"
            else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        )
        self.unet = UNet2DModel(
            in_channels=latent_channels + condition_channels,
            out_channels=latent_channels,
            block_out_channels=config.widths,
            layers_per_block=config.num_res_blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else plain_down for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else plain_up for a in reversed(attends)),
            downsample_type=config.resample,
            upsample_type=config.resample,
            resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
            attention_head_dim=config.base_width // config.num_heads if config.num_heads else config.head_channels,
            norm_num_groups=config.norm_groups,
            attn_norm_num_groups=config.norm_groups,
            norm_eps=1e-5,
            downsample_padding=1,
            flip_sin_to_cos=True,
            freq_shift=0,
            dropout=config.dropout,
            class_embed_type="identity" if config.condition_noise else None,
        )
        if config.condition_noise:  # the strength is told as time is, beside it; at first it has no effect
            self.strength_waves = Timesteps(config.base_width, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.strength_embedding = TimestepEmbedding(config.base_width, 4 * config.base_width)
            nn.init.zeros_(self.strength_embedding.linear_2.weight)
            nn.init.zeros_(self.strength_embedding.linear_2.bias)
        if config.num_heads:  # the U-Net above knows one head width only; heads are counted when attention runs
            for module in self.unet.modules():
                if isinstance(module, Attention):
                    module.heads = config.num_heads

    @property
    def multiple(self) -> int:
        """Latent height and width must be multiples of this."""
        return 2 ** (len(self.config.width_mult) - 1)

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Tensor | None = None, strength: Tensor | None = None
    ) -> Tensor:
        """z_t (B,C,h,w) scaled, t (B,) int64 in 0..T-1, condition (B,C,h,w) scaled → prediction (B,C,h,w): eps, x0 or
        v, as the model's schedule says. strength (B,): of the noise that is in the condition, None for none; only for a
        model with `condition_noise`. Raises `UserError` on wrong shapes or a missing condition."""
        if z_t.ndim != 4 or z_t.shape[1] != self.latent_channels or 0 in z_t.shape:
            raise UserError(f"z_t has shape {tuple(z_t.shape)}; expected (B, {self.latent_channels}, h, w)")
        if (condition is None) != (self.condition_channels == 0):
            raise UserError("this denoiser needs a condition latent" if condition is None else "unexpected condition")
        if z_t.shape[2] % self.multiple or z_t.shape[3] % self.multiple:
            raise UserError(
                f"latent of {z_t.shape[2]}x{z_t.shape[3]} cells: sides must be multiples of {self.multiple}"
            )
        if condition is not None:
            expected = (z_t.shape[0], self.condition_channels, *z_t.shape[2:])
            if condition.shape != expected:
                raise UserError(f"condition has shape {tuple(condition.shape)}; expected {expected}")
            z_t = torch.cat([z_t, condition], dim=1)
        if not self.config.condition_noise:
            if strength is not None:
                raise UserError("this denoiser was built for conditions without noise; it takes no strength")
            return self.unet(z_t, t).sample
        strength = torch.zeros(len(z_t), device=z_t.device) if strength is None else strength
        # in thousandths, so that its waves have the range of the time steps'
        waves = self.strength_waves(1000.0 * strength.float()).to(z_t.dtype)
        return self.unet(z_t, t, class_labels=self.strength_embedding(waves)).sample
