"""Run by test_kernel.py: the fused gradient, interpreted, against the plain path's in float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import copy

import torch
from torch import Tensor

from pipeline import liif
from pipeline.geometry import Axis, axis_range
from pipeline.kernels import liif_triton, liif_triton_gradient
from pipeline.liif import LiifHead

# Not bfloat16, see interpret_kernel.py. Errors are relative to the largest entry of each gradient.
CASES = [
    # width, depth, batch, cells, size, window, pixels of a part, dtype, largest error
    (16, 1, 1, (3, 4), (9, 10), (0, 0, 9, 10), 1 << 16, torch.float32, 2e-6),
    (32, 3, 2, (5, 3), (17, 29), (2, 3, 11, 16), 100, torch.float32, 2e-6),
    (256, 4, 1, (2, 3), (5, 7), (0, 0, 5, 7), 1 << 16, torch.float32, 2e-6),
    (64, 4, 2, (4, 5), (9, 12), (1, 0, 9, 11), 70, torch.float16, 4e-2),
]


def gradients(head: LiifHead, features: Tensor, rows: Axis, cols: Axis, is_fused: bool) -> list[Tensor]:
    """The image, and the gradients of the features and of what learns, for a loss that tells pixels apart."""
    head.zero_grad()
    features = features.detach().requires_grad_()
    table = head.table(features)
    image = head._fused(table, rows, cols, True) if is_fused else None
    if not is_fused:
        image = head._block(table, rows.to(table.dtype), cols.to(table.dtype))
    assert image is not None
    (image * torch.linspace(-9, 9, image.numel()).sin().reshape(image.shape).to(image)).sum().backward()
    assert features.grad is not None
    learned = [p.grad for p in head.parameters() if p.grad is not None]
    assert len(learned) == sum(p.requires_grad for p in head.parameters())
    return [image.detach(), features.grad, *learned]


def main() -> None:
    liif_triton.DTYPES += (torch.float32,)  # to see small errors
    for width, depth, batch, cells, size, window, part, dtype, allowed in CASES:
        liif_triton_gradient.PART = part
        torch.manual_seed(0)
        head, features = LiifHead(8, width, depth).double(), torch.randn(batch, 8, *cells, dtype=torch.float64)
        for parameter in head.parameters():  # large enough that a wrong sign shows
            parameter.data.normal_(std=max(parameter.shape[-1], 2) ** -0.5)
        y0, x0, y1, x1 = window
        rows, cols = (
            axis_range(a, b, n, k, dtype=torch.float64, device=features.device)
            for a, b, n, k in ((y0, y1, size[0], cells[0]), (x0, x1, size[1], cells[1]))
        )
        for is_frozen in (False, True):
            head.requires_grad_(not is_frozen)
            exact = gradients(head, features, rows, cols, False)
            low = copy.deepcopy(head).to(dtype)
            plain, fused = (gradients(low, features.to(dtype), rows, cols, way) for way in (False, True))
            for number, (value, usual, here) in enumerate(zip(exact, plain, fused)):
                assert here.dtype == dtype and here.shape == value.shape
                error, usual_error = ((x.double() - value).abs().max() / value.abs().max() for x in (here, usual))
                text = f"width {width}, depth {depth}, {dtype}, number {number}: {error}, plainly {usual_error}"
                assert error < allowed and error < 2 * usual_error + 2e-6, text
    assert not liif._failed and len(liif._rehearsed) == 2 * len(CASES)
    print(f"{len(CASES)} cases agree")


main()
