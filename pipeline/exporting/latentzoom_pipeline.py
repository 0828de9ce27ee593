"""A latentzoom model as a diffusers pipeline: new images and enlargements at any height × width.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=f"{FOLDER}/latentzoom_pipeline.py",
                                             trust_remote_code=True)
    pipe(height=700, width=1000, generator=torch.Generator().manual_seed(0)).images   # task "generation"
    pipe(image=picture, scale=3.3).images                                             # every task

This file is a part of an exported folder and stands alone: it needs torch and diffusers, not latentzoom. It draws what
latentzoom draws, in the plain way: whole RGB pictures, without tiles; transparency, profiles and files of any size are
latentzoom's. Legend: B batch, C latent channels, h/w latent cells, H/W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor

Size = tuple[int, int]


class LatentZoomPipeline(DiffusionPipeline):
    """decoder: ImplicitDecoder. vae: AutoencoderKL, VQModel or LatentEncoder; none where the latent is the picture.
    unet, scheduler: of the diffusion; none for models that render their input directly. model: latentzoom's
    description of the whole, its config.json's."""

    _optional_components = ["scheduler", "unet", "vae"]
    decoder: Any
    scheduler: Any
    unet: Any
    vae: Any

    def __init__(
        self,
        decoder: Any,
        scheduler: Any = None,
        unet: Any = None,
        vae: Any = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(decoder=decoder, scheduler=scheduler, unet=unet, vae=vae)
        self.register_to_config(model=model)
        self.model: dict[str, Any] = dict(model or {})
        heads = self.model["denoiser"]["num_heads"]
        if unet is not None and heads:  # as many at every level; diffusers' own setting is their width
            for module in unet.modules():
                if hasattr(module, "heads"):
                    module.heads = heads

    @property
    def task(self) -> str:
        return str(self.model["task"])

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.model["autoencoder"]["width_mult"]) - 1)

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | None = None,
        scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int = 1,
        latent_size: Size | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """New images of height × width (unless given: the training size), or `image` enlarged by `scale` or to
        height × width. generator: one for each image makes it independent of the batch. output_type: "pil", "np"
        (B,H,W,3) in [0, 1], or "pt" (B,3,H,W) about [-1, 1]. latent_size: cells (h, w) of new images."""
        if image is None:
            if self.task != "generation":
                raise ValueError(f"this model is for {self.task}: it needs an image")
            side = self.model["image_size"]
            size = (height or side, width or side)
            latent = self._sample(num_inference_steps, generator, batch_size, latent_size, None)
        else:
            pixels = self._tensor(image)
            h, w = pixels.shape[-2:]
            if scale is not None and height is None and width is None:
                size = (max(1, round(h * scale)), max(1, round(w * scale)))
            elif scale is None and height is not None and width is not None:
                size = (height, width)
            else:
                raise ValueError("give either scale, or height and width")
            condition = self._condition(pixels)
            if self.task == "sr" and num_inference_steps:
                latent = self._sample(num_inference_steps, generator, 1, None, condition)
            else:
                latent = condition / self.model["scale_factor"]
        made: Any = self._render(latent, size)
        if output_type != "pt":
            array = (
                ((made.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            )
            made = array / np.float32(255) if output_type == "np" else [Image.fromarray(one) for one in array]
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def _tensor(self, image: Image.Image) -> Tensor:
        """(1,3,H,W) in [-1, 1]."""
        array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32)
        return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].to(self.device) / 127.5 - 1.0

    def _condition(self, pixels: Tensor) -> Tensor:
        """The low-resolution picture at the size at which it is encoded, encoded and scaled: (1,C,h,w)."""
        config, unet = self.model, self.unet
        levels = len(unet.config.block_out_channels) if self.task == "sr" and unet is not None else 1
        multiple = self.factor * 2 ** (levels - 1)
        enlarging = config["image_size"] / config["lr_size"] if config["lr_size"] else self.factor
        size = tuple(max(1, round(side * enlarging / multiple)) * multiple for side in pixels.shape[-2:])
        if tuple(pixels.shape[-2:]) != size:
            if config["condition_resize"] == "nearest":
                pixels = F.interpolate(pixels, size=size, mode="nearest")
            else:
                pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
        if config["condition_resize"] != "nearest":
            pixels = pixels.clamp(-1, 1)
        return self._encode(pixels) * config["scale_factor"]

    def _encode(self, pixels: Tensor) -> Tensor:
        if self.vae is None:
            return pixels
        encoded = self.vae.encode(pixels) if hasattr(self.vae, "encode") else self.vae(pixels)
        if isinstance(encoded, Tensor):
            return encoded
        return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()

    def _sample(
        self, num_steps: int, generator: Any, batch_size: int, latent_size: Size | None, condition: Tensor | None
    ) -> Tensor:
        """Unscaled latents (B,C,h,w), by the pipeline's scheduler."""
        if self.unet is None:
            raise ValueError("this model has no denoiser")
        side = self.model["image_size"] // self.factor
        shape = condition.shape if condition is not None else (
            batch_size, self.model["autoencoder"]["latent_channels"], *(latent_size or (side, side))
        )  # fmt: skip
        z = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        schedule = self.model["schedule"]
        if schedule.get("distilled_steps"):
            return self._clean(z, self._predict(z, schedule["num_steps"] - 1, condition)) / self.model["scale_factor"]
        steps = self._timesteps(num_steps)
        self.scheduler.set_timesteps(**({"num_inference_steps": num_steps} if steps is None else {"timesteps": steps}))
        z = z * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            z = self.scheduler.step(self._predict(z, int(t), condition), t, z, return_dict=False)[0]
        return z / self.model["scale_factor"]

    def _predict(self, z: Tensor, t: int, condition: Tensor | None) -> Tensor:
        seen = z if condition is None else torch.cat([z, condition], dim=1)
        steps = torch.full((len(z),), t, device=z.device)
        return self.unet(seen.to(self.unet.dtype), steps).sample.to(z.dtype)

    def _clean(self, z: Tensor, prediction: Tensor) -> Tensor:
        """What a distilled denoiser's only evaluation, at the noisiest step, says of the latent."""
        abar = self.scheduler.alphas_cumprod[-1]
        kind = self.model["schedule"]["prediction"]
        if kind == "x0":
            return prediction
        if kind == "v":
            return abar.sqrt() * z - (1 - abar).sqrt() * prediction
        return (z - (1 - abar).sqrt() * prediction) / abar.sqrt()

    def _timesteps(self, num_steps: int) -> list[int] | None:
        """DPM-Solver's time steps as latentzoom takes them: evenly spaced in log-SNR, from the first to the last; those
        of a schedule that ends in noise alone are counted down from there. None for another scheduler's own."""
        if not hasattr(self.scheduler.config, "solver_order"):
            return None
        total = self.model["schedule"]["num_steps"]
        if self.model["schedule"]["zero_terminal_snr"]:
            return [-(-(i + 1) * total // num_steps) - 1 for i in reversed(range(num_steps))]
        betas = torch.tensor(self.scheduler.config.trained_betas, dtype=torch.float64)
        abar = torch.cumprod(1.0 - betas, dim=0)
        log_snr = (abar / (1.0 - abar)).log().flip(0)
        targets = torch.linspace(float(log_snr[0]), float(log_snr[-1]), num_steps, dtype=torch.float64)
        upper = torch.searchsorted(log_snr, targets).clamp(1 if total > 1 else 0, total - 1)
        lower = (upper - 1).clamp(min=0)
        nearest = torch.where(targets - log_snr[lower] < log_snr[upper] - targets, lower, upper)
        steps: list[int] = []
        for i, position in enumerate(nearest.tolist()):
            steps.append(min(max(position, steps[-1] + 1 if steps else 0), total - num_steps + i))
        return [total - 1 - step for step in steps]

    def _render(self, latent: Tensor, size: Size) -> Tensor:
        """Where pixels are larger than cells, a multiple of the size with at least one and a half pixels a cell is
        drawn and reduced."""
        height, width = (
            side if side >= num else side * -(-3 * num // (2 * side)) for side, num in zip(size, latent.shape[-2:])
        )
        image = self.decoder(latent.to(self.decoder.dtype), (height, width)).float()
        if (height, width) == tuple(size):
            return image
        return F.interpolate(image, size=tuple(size), mode="bicubic", align_corners=False, antialias=True)
