"""The codebook of a VQ autoencoder (van den Oord et al., 2017; Esser et al., CVPR 2021).

Legend: B batch, C latent channels, h/w latent cells, n codes. Latents are unscaled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.precision import without_autocast

_COMMITMENT = 0.25
"""beta of the released code, where it weighs the term that moves the codes."""


class Quantizer(nn.Module):
    """Nearest-code look-up. Everything is computed in at least float32, under autocast too: between 8192 codes in three
    dimensions the differences of distances are below what half precision resolves."""

    def __init__(self, num_embeddings: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, channels)
        self.embedding.weight.data.uniform_(-1.0 / num_embeddings, 1.0 / num_embeddings)

    @torch.no_grad()
    def codes(self, latent: Tensor) -> Tensor:
        """latent (B,C,h,w) → number of the nearest code of each cell, (B,h,w) int64."""
        with without_autocast(latent.device.type):
            cells, codebook = self._exact(latent)
            # Not by |z|^2 - 2 z·e + |e|^2, which cancels (and rounds to TF32 where matrix products may).
            distances = torch.cdist(cells.flatten(0, 2), codebook, compute_mode="donot_use_mm_for_euclid_dist")
            return distances.argmin(dim=1).reshape(cells.shape[:3])

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent (B,C,h,w) → nearest codes (B,C,h,w) with straight-through gradient, and the codebook loss, a mean over
        latents (scalar): | sg(code) - z |^2 + 0.25 · | code - sg(z) |^2, as LDM's autoencoders were trained."""
        with without_autocast(latent.device.type):
            cells, codebook = self._exact(latent)
            chosen = F.embedding(self.codes(latent), codebook)
            loss = (chosen.detach() - cells).square().mean() + _COMMITMENT * (chosen - cells.detach()).square().mean()
            quantised = cells + (chosen - cells).detach()
            return quantised.permute(0, 3, 1, 2).contiguous(), loss

    def _exact(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Cells (B,h,w,C) and the codebook (n,C), at least float32."""
        dtype = torch.promote_types(latent.dtype, torch.float32)
        return latent.permute(0, 2, 3, 1).to(dtype).contiguous(), self.embedding.weight.to(dtype)
