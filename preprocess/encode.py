"""Pixels → stored latents, in batches of one fixed size.

Legend: B images of a batch, S stored channels, H/W pixels, h/w latent grid.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config import AutoencoderConfig, to_dict
from pipeline.errors import UserError
from pipeline.images import from_uint8, to_uint8
from pipeline.resize import enlarge, resize
from preprocess.config import PreprocessConfig
from preprocess.shards.sample import latent_member


class StoredEncoder(Protocol):
    """The part of an autoencoder that preprocessing needs."""

    config: AutoencoderConfig

    def moments(self, image: Tensor) -> Tensor: ...

    def identity(self) -> str: ...


def autoencoder_facts(autoencoder: StoredEncoder, size: int) -> dict[str, Any]:
    """Identity and stored shape of an autoencoder: what the plan and the manifest keep of it."""
    config = autoencoder.config
    if size % config.factor:
        raise UserError(f"--size {size} is not a multiple of {config.factor}, the autoencoder's pixels per latent cell")
    side = size // config.factor
    return {
        "identity": autoencoder.identity(),
        "config": to_dict(config),
        "latent_channels": config.latent_channels,
        "latent_shape": [config.stored_channels, side, side],
    }


class LatentEncoder:
    """Encodes batches. Thread count and batch size move the last bits of a latent, so the plan fixes both."""

    def __init__(self, autoencoder: StoredEncoder, config: PreprocessConfig) -> None:
        self.config = config
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {config.device}: no CUDA device here; use --device cpu")
        self.device = torch.device(config.device)
        if (self.device.index or 0) >= max(1, torch.cuda.device_count()):
            raise UserError(
                f"--device {config.device}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
            )
        self.autoencoder = autoencoder
        if isinstance(autoencoder, torch.nn.Module):
            autoencoder.to(self.device).eval().requires_grad_(False)
        torch.set_num_threads(config.encode_threads)

    def _condition_side(self, lr_size: int) -> int:
        """Pixels a side at which a condition is encoded."""
        return lr_size * self.autoencoder.config.factor if self.config.condition_cells == "input" else self.config.size

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (n,H,W,3), n ≤ batch size → {member name: (n,S,h,w)} in the stored number format.

        The batch is padded to its full size, so a sample's latent does not depend on how full its batch was.
        """
        num = pixels.shape[0]
        batch = torch.zeros((self.config.batch_size, *pixels.shape[1:]), dtype=torch.uint8)
        batch[:num] = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        image = from_uint8(batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
        outputs = {}
        for flip in (False, True) if self.config.flips else (False,):
            view = image.flip(-1).contiguous() if flip else image.contiguous()
            outputs[latent_member(flip)] = self.autoencoder.moments(view)
            for lr_size in self.config.lr_sizes:
                condition = low_resolution(view, lr_size, self.config.condition_resize, self._condition_side(lr_size))
                outputs[latent_member(flip, lr_size)] = self.autoencoder.moments(condition)
        dtype = torch.float16 if self.config.dtype == "float16" else torch.float32
        return {name: stored[:num].to(dtype).cpu().numpy() for name, stored in outputs.items()}


def low_resolution(image: Tensor, lr_size: int, mode: str, side: int) -> Tensor:
    """An image as a super-resolution model sees it: reduced to `lr_size` (anti-aliased, 8 bits), then enlarged again.

    image: (B,3,H,W) in [-1,1] → (B,3,side,side). mode: how it is enlarged, "nearest" or "bicubic".
    """
    small = from_uint8(to_uint8(resize(image, (lr_size, lr_size))))
    return enlarge(small, (side, side), mode)
