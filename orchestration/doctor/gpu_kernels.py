"""The part `kernels` of `latentzoom doctor --gpu`: fast heads against float64."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from orchestration.doctor.gpu_bench import Bench, Figures, NotInstalled
from pipeline.geometry import axis_range
from pipeline.liif import LiifHead


def kernels(bench: Bench) -> Figures:
    """The head, its image and its gradients, in half precision against float64: at most twice as far from it as the
    plain path in the same precision. On a CPU the path for processors takes the fused kernels' place."""
    # Each width and type is compiled anew, three times over; depths are not.
    cases = [(width, depth, torch.bfloat16) for width, depth in ((64, 3), (128, 4), (256, 2), (256, 4), (256, 8))]
    cases = [(32, 2, torch.float32)] if bench.is_tiny else [*cases, (256, 4, torch.float16)]
    if not bench.is_tiny and importlib.util.find_spec("triton") is None:
        raise NotInstalled("triton")
    figures: Figures = {}
    for width, depth, dtype in cases:
        for is_frozen in (True, False):
            name = f"{width} × {depth} {str(dtype).removeprefix('torch.')}{', frozen' if is_frozen else ''}"
            fast, plain = _head_errors(bench.device, width, depth, dtype, is_frozen)
            figures[f"{name}: error, that of the plain path"] = f"{fast:.2e}, {plain:.2e}"
            assert fast < 2 * plain + 1e-5, f"{name}: the error is {fast:.2e}, the plain path's {plain:.2e}"
    from pipeline import liif

    assert not liif._failed, f"kernels that do not run here: {sorted(map(str, liif._failed))}"
    return figures


def _head_errors(device: str, width: int, depth: int, dtype: torch.dtype, is_frozen: bool) -> tuple[float, float]:
    """The largest error of image and gradients, relative to their norms: of the fast path, and of the plain one."""
    torch.manual_seed(0)
    head = LiifHead(64, width, depth).to(device)
    for parameter in head.parameters():  # large enough that a wrong sign shows
        parameter.data.normal_(std=max(parameter.shape[-1], 2) ** -0.5)
    head.requires_grad_(not is_frozen)
    features = torch.randn(2, 64, 15, 13, device=device)

    def results(head: LiifHead, features: Tensor, chunk: int | None) -> list[Tensor]:
        features = features.detach().requires_grad_()
        table = head.table(features)
        rows, cols = (
            axis_range(a, b, n, k, dtype=torch.float32, device=table.device)
            for a, b, n, k in ((3, 90, 100, 15), (0, 77, 77, 13))
        )
        image = head.grid(table, rows, cols, chunk=chunk)
        loss = (image.float() * torch.linspace(-9, 9, image.numel()).sin().reshape(image.shape).to(device)).sum()
        return [image, *torch.autograd.grad(loss, [features, *(p for p in head.parameters() if p.requires_grad)])]

    def copy(dtype: torch.dtype) -> LiifHead:
        fresh = LiifHead(64, width, depth).to(device)
        fresh.load_state_dict(head.state_dict())
        return fresh.to(dtype).requires_grad_(not is_frozen)

    exact = results(copy(torch.float64), features.double(), 10**6)
    found = [results(copy(dtype), features.to(dtype), chunk) for chunk in (None, 10**6)]
    errors = [max(float((x.double() - value).norm() / value.norm()) for x, value in zip(each, exact)) for each in found]
    return errors[0], errors[1]
