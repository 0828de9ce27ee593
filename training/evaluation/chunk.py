"""One chunk of an evaluation: samples start..stop-1 of one task → arrays. Sample i depends on seed + i only.

Keys of the result: `value|figure|method|setting` (B,) per-picture figures, `feature|network|real/fake|setting` (B,D),
`picture|method|setting|index` (H,W,3) for the first few samples. Legend: B samples, D features, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import UserError
from pipeline.images import from_uint8, to_uint8
from pipeline.metrics.psnr import psnr
from pipeline.metrics.ssim import WINDOW, resize_pictures, self_ssim_pairs, ssim
from pipeline.model import LatentZoom
from pipeline.resize import Size, resize
from training.evaluation.data import Pictures, square, stack
from training.evaluation.networks import Networks, build_networks
from training.evaluation.spec import EvaluationSpec, scale_name, size_name

Arrays = dict[str, np.ndarray]


class ChunkWorker:
    """A loaded model with its metric networks; computes chunks. One lives in each worker process."""

    def __init__(
        self, spec: EvaluationSpec, bundle: str | LatentZoom, pictures: Pictures, device: str = "cpu", teacher: str = ""
    ) -> None:
        self.spec, self.pictures, self.device = spec, pictures, device
        self.model = bundle if isinstance(bundle, LatentZoom) else LatentZoom.load(bundle, device=device)
        self.teacher = LatentZoom.load(teacher, device=device) if teacher else None
        self.networks: Networks = build_networks(spec, device)

    @torch.no_grad()
    def run(self, start: int, stop: int) -> Arrays:
        """Samples start..stop-1, `batch_size` at a time."""
        parts: list[Arrays] = []
        for first in range(start, stop, self.spec.batch_size):
            last = min(first + self.spec.batch_size, stop)
            compute = {"reconstruction": self._reconstruction, "generation": self._generation, "sr": self._sr}
            parts += [_to_numpy(part) for part in compute[self.spec.task](first, last)]
        return concatenate(parts)

    # --- tasks --------------------------------------------------------------------------------------------------------

    def _reconstruction(self, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        side = self.model.config.image_size
        images = stack([square(p, side) for p in self.pictures.read(first, last)])
        latent = self.model.encode(from_uint8(images))
        features = self.model.features(latent)
        thumbnail_side = thumbnail_size(latent)
        thumbnail = resize_pictures(images, (thumbnail_side, thumbnail_side))
        result: dict[str, Tensor] = {}
        for size in self.spec.sizes or (side,):
            if size > side:
                raise UserError(f"reconstruction at {size} has no truth: the model's pictures have {side} pixels")
            truth = resize_pictures(images, (size, size))
            ours = to_uint8(self.model.render(features, (size, size)))
            self._compare(result, size_name((size, size)), ours, truth, thumbnail, first, scale=1.0)
        yield result

    def _sr(self, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        if self.spec.sr_mode == "fixed-input":
            yield self._sr_fixed_input(first, last)
        else:
            for index, picture in enumerate(self.pictures.read(first, last), start=first):
                yield self._sr_fixed_truth(picture[None], index)

    def _sr_fixed_input(self, first: int, last: int) -> dict[str, Tensor]:
        lr = self.model.config.lr_size or self.model.config.latent_size
        pictures = self.pictures.read(first, last)
        available = min(min(p.shape[-2:]) for p in pictures)
        low = stack([square(p, lr) for p in pictures])
        features = self.model.features(self._sr_latent(low, first))
        taught = self.teacher.features(self._teacher_latent(low, first)) if self.teacher else None
        result: dict[str, Tensor] = {}
        for scale in self.spec.scales:
            side = round(lr * scale)
            if side > available:
                raise UserError(
                    f"scale {scale:g} of {lr} pixels needs a truth of {side} pixels, but the data has {available}; "
                    f"use scales up to {available / lr:g}, or data with larger pictures"
                )
            truth = stack([square(p, side) for p in pictures])
            ours = to_uint8(self.model.render(features, (side, side)))
            teachers = (
                to_uint8(self.teacher.render(taught, (side, side))) if self.teacher and taught is not None else None
            )
            self._compare(result, scale_name(scale), ours, truth, low, first, scale=scale, teachers=teachers)
        return result

    def _sr_fixed_truth(self, picture: Tensor, index: int) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for scale in self.spec.scales:
            low_size = (int(picture.shape[-2] / scale), int(picture.shape[-1] / scale))
            size = (round(low_size[0] * scale), round(low_size[1] * scale))
            if min(low_size) < 2:
                raise UserError(f"scale {scale:g} leaves nothing of a picture of {tuple(picture.shape[-2:])}")
            top, left = (picture.shape[-2] - size[0]) // 2, (picture.shape[-1] - size[1]) // 2
            truth = picture[..., top : top + size[0], left : left + size[1]]
            low = resize_pictures(truth, low_size)
            ours = to_uint8(self.model.decode(self._sr_latent(low, index), size))
            teachers = None
            if self.teacher is not None:
                teachers = to_uint8(self.teacher.decode(self._teacher_latent(low, index), size))
            self._compare(result, scale_name(scale), ours, truth, low, index, scale=scale, teachers=teachers)
        return result

    def _generation(self, first: int, last: int) -> Iterator[dict[str, Tensor]]:
        side = self.model.config.image_size
        sizes = self.spec.sizes or (side,)
        latent = self.model.sample_latents(
            num=last - first,
            seed=[self.spec.seed + i for i in range(first, last)],
            sampler=self.spec.sampler,
            num_steps=self.model.evaluations(self.spec.num_steps),
            eta=self.spec.eta,
        )
        features = self.model.features(latent)
        pictures = self.pictures.read(first, last)
        result: dict[str, Tensor] = {}
        fakes: dict[str, Tensor] = {}
        for size in sizes:
            name = size_name((size, size))
            fakes[name] = to_uint8(self.model.render(features, (size, size)))
            truth = stack([square(p, size) for p in pictures])  # each from its own pixels, whatever lies beside it
            for network, module in self.networks.features.items():
                result[f"feature|{network}|real|{name}"] = module(truth.to(self.device))
                result[f"feature|{network}|fake|{name}"] = module(fakes[name])
            self._keep(result, "ours", name, fakes[name], first)
        for one, two, values in self_ssim_pairs(fakes):
            result[f"value|selfssim|ours|{one}-{two}"] = values
        yield result

    # --- parts --------------------------------------------------------------------------------------------------------

    def _sr_latent(self, low: Tensor, first: int) -> Tensor:
        """uint8 LR pictures → unscaled latents, as `LatentZoom.upscale` makes them, with one seed a sample."""
        return self._upscaled_latent(self.model, low, first, self.spec.num_steps)

    def _teacher_latent(self, low: Tensor, first: int) -> Tensor:
        """As `_sr_latent`, by the teacher."""
        assert self.teacher is not None
        return self._upscaled_latent(self.teacher, low, first, self.spec.teacher_steps)

    def _upscaled_latent(self, model: LatentZoom, low: Tensor, first: int, num_steps: int | None) -> Tensor:
        condition = model.condition(from_uint8(low))
        if model.renders_condition(num_steps):
            return condition / model.config.scale_factor
        return model.sample_latents(
            condition=condition,
            seed=[self.spec.seed + first + i for i in range(len(low))],
            sampler=self.spec.sampler,
            num_steps=model.evaluations(num_steps),
            eta=self.spec.eta,
            condition_noise=self.spec.condition_noise,
        )

    def _compare(
        self,
        result: dict[str, Tensor],
        setting: str,
        ours: Tensor,
        truth: Tensor,
        low: Tensor,
        first: int,
        scale: float,
        teachers: Tensor | None = None,
    ) -> None:
        """Per-picture figures of our pictures, of the teacher's and of the usual enlargements of `low`."""
        size: Size = (int(truth.shape[-2]), int(truth.shape[-1]))
        nearest = to_uint8(resize(from_uint8(low), size, mode="nearest"))
        others = (("nearest", nearest), ("bicubic", resize_pictures(low, size)), ("lanczos", _lanczos(low, size)))
        taught = () if teachers is None else (("teacher", teachers.cpu()),)
        for method, images in (("ours", ours.cpu()), *taught, *others):
            for protocol in self.spec.protocols:
                result[f"value|psnr_{protocol}|{method}|{setting}"] = psnr(images, truth, protocol, scale)
            if min(size) >= WINDOW:
                result[f"value|ssim|{method}|{setting}"] = ssim(images, truth)
            if min(size) >= self.networks.lpips.min_size:
                distance = self.networks.lpips(images.to(self.device), truth.to(self.device))
                result[f"value|{self.networks.lpips_name}|{method}|{setting}"] = distance
            self._keep(result, method, setting, images, first)
        self._keep(result, "low", setting, low, first)
        self._keep(result, "truth", setting, truth, first)

    def _keep(self, result: dict[str, Tensor], method: str, setting: str, images: Tensor, first: int) -> None:
        for offset in range(min(len(images), max(0, self.spec.num_pictures - first))):
            result[f"picture|{method}|{setting}|{first + offset}"] = images[offset].permute(1, 2, 0)


def thumbnail_size(latent: Tensor) -> int:
    """Side of the largest square RGB thumbnail that holds no more numbers than one latent (B,C,h,w)."""
    return int((latent[0].numel() / 3) ** 0.5)


def concatenate(parts: list[Arrays]) -> Arrays:
    """Chunks in sample order → one dictionary; pictures are taken over as they are."""
    result: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for key, array in part.items():
            result.setdefault(key, []).append(array)
    return {k: v[0] if k.startswith("picture|") else np.concatenate(v) for k, v in result.items()}


def _lanczos(pictures: Tensor, size: Size) -> Tensor:
    """uint8 (B,3,h,w) → (B,3,*size), by Pillow."""
    arrays = [
        np.asarray(Image.fromarray(p).resize((size[1], size[0]), Image.Resampling.LANCZOS))
        for p in pictures.permute(0, 2, 3, 1).cpu().numpy()
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _to_numpy(part: dict[str, Tensor]) -> Arrays:
    return {key: tensor.detach().cpu().numpy() for key, tensor in part.items()}
