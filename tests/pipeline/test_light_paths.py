"""The light head's three ways to a pixel: the two-pass path of a CPU, the plain blocks, single points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_direct import direct_bundle
from torch import Tensor

from pipeline.decoder import ImplicitDecoder
from pipeline.errors import UserError
from pipeline.geometry import axis_at
from pipeline.kernels import cpu
from pipeline.light import LightHead

SIDES = st.integers(1, 13)


def light_head(width: int = 8, depth: int = 3) -> LightHead:
    torch.manual_seed(0)
    head = LightHead(6, width, depth)
    for parameter in head.parameters():
        parameter.data.normal_(std=max(parameter.shape[-1], 2) ** -0.5)
    return head.eval().requires_grad_(False)


def table_of(head: LightHead, *shape: int) -> Tensor:
    with torch.no_grad():
        return head.table(torch.randn(shape[0], 6, *shape[1:], generator=torch.Generator().manual_seed(2)))


def two_pass(head: LightHead, table: Tensor, rows: Tensor, cols: Tensor, size: tuple[int, int], chunk: int) -> Tensor:
    shift = head.pixel_size(table.new_tensor([2.0 * table.shape[1] / size[0], 2.0 * table.shape[2] / size[1]]))
    along_y, along_x = axis_at(rows, size[0], table.shape[1]), axis_at(cols, size[1], table.shape[2])
    return cpu.render_light(table, along_y, along_x, list(head.hidden), head.out, shift, chunk)  # type: ignore[arg-type]


def points(head: LightHead, table: Tensor, rows: Tensor, cols: Tensor, size: tuple[int, int]) -> Tensor:
    grid = [axis.reshape(1, -1).expand(table.shape[0], -1) for axis in torch.meshgrid(rows, cols, indexing="ij")]
    axes = (axis_at(index, size[k], table.shape[k + 1]) for k, index in enumerate(grid))
    return head.points(table, *axes).reshape(table.shape[0], 3, len(rows), len(cols))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), SIDES, SIDES, st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.data())
def test_two_passes_equal_the_plain_blocks_and_single_points(
    batch: int, h: int, w: int, height: int, width: int, chunk: int, data: st.DataObject
) -> None:
    """Any shapes, enlarging or reducing, any window, any chunk: several images a block down to parts of a row."""
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, height)), data.draw(st.integers(x0 + 1, width))
    head, size = light_head(), (height, width)
    table, rows, cols = table_of(head, batch, h, w), torch.arange(y0, y1), torch.arange(x0, x1)
    with torch.no_grad():
        fast = two_pass(head, table, rows, cols, size, chunk)
        plain = head._block(table, axis_at(rows, height, h), axis_at(cols, width, w))
        assert fast.shape == (batch, 3, y1 - y0, x1 - x0)
        torch.testing.assert_close(fast, plain, atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(fast, points(head, table, rows, cols, size), atol=5e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["liif", "light"]), st.booleans(), st.lists(st.integers(0, 29)), st.sets(st.integers(0, 46)))
@example("light", False, [0, 29], {0, 46})
@example("light", True, [3, 3, 7], {5})
def test_a_lattice_holds_the_pixels_of_the_whole(kind: str, with_grad: bool, rows: list[int], cols: set[int]) -> None:
    """Two images at ×4.29 and ×5.22; rows and columns far apart, side by side, or one alone."""
    decoder = direct_bundle(kind).decoder
    assert decoder is not None
    along_y, along_x = torch.tensor(sorted(rows) or [11]), torch.tensor(sorted(cols) or [40])
    features = torch.randn(2, 6, 7, 9, generator=torch.Generator().manual_seed(3)).requires_grad_(with_grad)
    whole = decoder.render(features, (30, 47))
    found = decoder.render_lattice(features, (30, 47), along_y, along_x)
    assert found.shape == (2, 3, len(along_y), len(along_x)) and found.requires_grad is with_grad
    torch.testing.assert_close(found, whole[:, :, along_y[:, None], along_x], atol=5e-6, rtol=1e-5)


def test_the_gradient_of_a_lattice_is_that_of_its_pixels() -> None:
    decoder, rows, cols = lattice_decoder(), torch.tensor([0, 4, 5, 19]), torch.tensor([2, 3, 25])
    latent = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    (by_lattice,) = torch.autograd.grad(decoder(latent, (20, 27), None, (rows, cols)).square().sum(), latent)
    whole = decoder(latent, (20, 27))[:, :, rows[:, None], cols]
    (expected,) = torch.autograd.grad(whole.square().sum(), latent)
    torch.testing.assert_close(by_lattice, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "cols", "named"),
    [
        ([0, 20], [0, 1], "rows holds 0..20; an output of 20 pixels"),
        ([0, 1], [-1, 1], "cols holds -1..1"),
        ([0.0, 1.0], [0, 1], "pixel indices are whole numbers"),
        ([3, 1], [0, 1], "rows of a lattice must be a vector of ascending"),
        ([1, 3], [4, 0], "cols of a lattice must be a vector of ascending"),
        ([[1, 3]], [0, 4], "rows of a lattice"),
        (torch.arange(0), [0, 4], "rows of a lattice .* at least one"),
    ],
)
def test_bad_lattices(rows: Any, cols: Any, named: str) -> None:
    decoder = lattice_decoder()
    with pytest.raises(UserError, match=named):
        decoder(torch.zeros(1, 3, 6, 8), (20, 27), None, (torch.as_tensor(rows), torch.as_tensor(cols)))


def lattice_decoder() -> ImplicitDecoder:
    decoder = direct_bundle().decoder
    assert decoder is not None
    return decoder
