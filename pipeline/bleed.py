"""Colours under transparency: what nobody sees must not colour what one sees. Legend: H/W pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.reading import Picture


def visible_colours(picture: Picture) -> Tensor:
    """(1,3,H,W) in [-1, 1] of a picture in its own colours. Where alpha is 0, the colours around continue: networks
    and filters look across rims, and what a program left under them (often black) would show."""
    colour, alpha = picture.rgb(), picture.opacity()
    if alpha is None or int(alpha.min()) > 0:
        return colour
    weight = alpha.float() / 255
    filled = _filled(colour * weight, weight)
    return torch.where(alpha > 0, colour, filled)


def _filled(total: Tensor, weight: Tensor) -> Tensor:
    """Weighted colours (1,3,H,W) and their weights (1,1,H,W) → colours everywhere: where nothing weighs, those of twice
    as wide a neighbourhood, and so on. Grey where no pixel of the picture weighs anything."""
    if max(weight.shape[-2:]) == 1 or bool((weight > 0).all()):
        return torch.where(weight > 0, total / weight.clamp(min=1e-6), 0.0)
    size = weight.shape[-2:]
    wide = _filled(_halved(total), _halved(weight))
    around = F.interpolate(wide, scale_factor=2, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    return torch.where(weight > 0, total / weight.clamp(min=1e-6), around)


def _halved(values: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(values, (0, values.shape[-1] % 2, 0, values.shape[-2] % 2)), 2)
