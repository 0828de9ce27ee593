"""Coordinates are exact at any size and in any precision."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.geometry import MAX_SIDE, axis_at, axis_range, check_size, check_window, pixel_centres

CPU = torch.device("cpu")


def exact(i: int, n: int, h: int) -> tuple[int, int, Fraction, Fraction]:
    """Lower and upper cell and the relative coordinates to their centres, in rational numbers."""
    position = Fraction((2 * i + 1) * h, 2 * n)
    lower = (position - Fraction(1, 2)).__floor__()
    cells = [min(max(k, 0), h - 1) for k in (lower, lower + 1)]
    return cells[0], cells[1], *(2 * (position - k - Fraction(1, 2)) for k in cells)  # type: ignore[return-value]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_geometry_is_exact(data: st.DataObject) -> None:
    n, h = data.draw(st.integers(1, MAX_SIDE)), data.draw(st.integers(1, 4096))
    i = data.draw(st.integers(0, n - 1))
    lower, upper, rel_lower, rel_upper = exact(i, n, h)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        axis = axis_at(torch.tensor([i]), n, h, dtype)
        assert (int(axis.lower), int(axis.upper)) == (lower, upper)
        # Only the last rounding is left: the nearest number of that precision.
        assert axis.rel_lower.dtype == dtype
        assert torch.equal(axis.rel_lower, torch.tensor([float(rel_lower)], dtype=torch.float64).to(dtype))
        assert torch.equal(axis.rel_upper, torch.tensor([float(rel_upper)], dtype=torch.float64).to(dtype))
    assert axis.cell == pytest.approx(float(Fraction(2 * h, n)), rel=1e-15)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64))
def test_ensemble_weights_sum_to_one_and_are_linear(n: int, h: int) -> None:
    axis = axis_range(0, n, n, h, dtype=torch.float64, device=CPU)
    assert torch.allclose(axis.weight_lower + axis.weight_upper, torch.ones(n, dtype=torch.float64))
    assert bool((axis.weight_lower >= 0).all()) and bool((axis.weight_upper >= 0).all())
    inside = axis.lower != axis.upper
    # Between two centres the weight of the lower falls linearly: at its centre it is 1.
    expected = 1 - axis.rel_lower / 2
    assert torch.allclose(axis.weight_lower[inside], expected[inside])


def test_half_precision_tells_neighbouring_cells_apart_at_gigantic_sizes() -> None:
    """At 2^20 pixels over 4096 cells, each cell's 256 pixels must still fall into it, whatever the dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        axis = axis_range(MAX_SIDE - 1024, MAX_SIDE, MAX_SIDE, 4096, dtype=dtype, device=CPU)
        assert axis.lower.tolist() == [min((2 * i + 1 - 256) // 512, 4095) for i in range(MAX_SIDE - 1024, MAX_SIDE)]
        assert axis.rel_lower.abs().max() <= 2 and len(axis.rel_lower.unique()) > 128


def test_window_of_an_axis_is_a_slice_of_it() -> None:
    whole = axis_range(0, 1000, 1000, 17, dtype=torch.float32, device=CPU)
    part = axis_range(200, 300, 1000, 17, dtype=torch.float32, device=CPU)
    for name in ("lower", "upper", "rel_lower", "rel_upper", "weight_lower", "weight_upper"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[200:300])


def test_edges_use_the_edge_cell_alone() -> None:
    axis = axis_range(0, 8, 8, 2, dtype=torch.float64, device=CPU)
    assert axis.lower.tolist() == [0, 0, 0, 0, 0, 0, 1, 1] and axis.upper.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert axis.rel_lower.tolist() == [-0.75, -0.25, 0.25, 0.75, 1.25, 1.75, 0.25, 0.75]


def test_pixel_centres() -> None:
    assert pixel_centres(4, torch.float64).tolist() == [-0.75, -0.25, 0.25, 0.75]


@pytest.mark.parametrize(
    "size",
    [
        *((0, 4), (4, 0), (-3, 4), (MAX_SIDE + 1, 4), (4, 10**30), (2.5, 4), (float("nan"), 4), (float("inf"), 4)),
        *((4,), (4, 4, 4), 4, None, ("4", 4), (True, 4)),
    ],
)
def test_bad_sizes(size: object) -> None:
    with pytest.raises(UserError, match="size .* is not allowed"):
        check_size(size)  # type: ignore[arg-type]


def test_good_sizes() -> None:
    assert check_size((1, MAX_SIDE)) == (1, MAX_SIDE) and check_size((4.0, torch.tensor(5))) == (4, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "window",
    [
        *((0, 0, 11, 5), (0, 0, 5, 21), (-1, 0, 5, 5), (0, -1, 5, 5), (5, 0, 5, 5), (6, 0, 5, 5), (0, 9, 5, 9)),
        *((0, 0, 5), 5, (0, 0, 5.5, 5), (0, 0, float("nan"), 5)),
    ],
)
def test_bad_windows(window: object) -> None:
    with pytest.raises(UserError, match="is not inside the output of 10x20"):
        check_window(window, (10, 20))  # type: ignore[arg-type]


def test_good_windows() -> None:
    assert check_window(None, (10, 20)) == (0, 0, 10, 20)
    assert check_window((9, 19, 10, 20), (10, 20)) == (9, 19, 10, 20)
