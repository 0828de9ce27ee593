"""Run by test_kernel.py: every case of the Triton kernel, interpreted, against the plain path."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from pipeline.geometry import axis_range
from pipeline.kernels import liif_triton
from pipeline.kernels.liif_triton import Launch
from pipeline.liif import LiifHead

# Not bfloat16: the interpreter's products read its bits as whole numbers (Triton 3.9). A GPU test has it.
CASES = [
    # width, depth, batch, cells, size, window, dtype, largest error
    (16, 1, 1, (3, 4), (9, 10), (0, 0, 9, 10), torch.float32, 1e-5),
    (32, 3, 2, (5, 3), (17, 29), (2, 3, 17, 20), torch.float32, 1e-5),
    (256, 4, 1, (4, 4), (11, 13), (0, 0, 11, 13), torch.float32, 1e-5),
    (16, 2, 1, (4, 5), (1 << 20, 1 << 20), (0, (1 << 20) - 7, 3, 1 << 20), torch.float32, 1e-5),
    (64, 3, 3, (2, 2), (7, 5), (0, 0, 7, 5), torch.float16, 5e-3),
]


@torch.no_grad()
def main() -> None:
    for width, depth, batch, cells, size, window, dtype, allowed in CASES:
        torch.manual_seed(0)
        head = LiifHead(8, width, depth)
        features = torch.randn(batch, 8, *cells)
        y0, x0, y1, x1 = window
        rows, cols = (
            axis_range(a, b, n, k, dtype=torch.float32, device=features.device)
            for a, b, n, k in ((y0, y1, size[0], cells[0]), (x0, x1, size[1], cells[1]))
        )
        expected = head._block(head.table(features), rows, cols)
        head = head.to(dtype)
        table = head.table(features.to(dtype))
        assert liif_triton.supports(table, depth) == (dtype != torch.float32)
        for launch in (Launch(16, 4), Launch(32, 4)):
            image = liif_triton.render_liif(table, rows, cols, head._later_layers(), head.out, head._position(), launch)
            assert image.shape == expected.shape and image.dtype == dtype
            error = float((image.float() - expected).abs().max())
            assert error < allowed, f"width {width}, depth {depth}, {dtype}: {error}"
    print(f"{len(CASES)} cases agree")


main()
