"""What compiling ahead of time reads from machine code, and that it tells what must not be."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (`make kernels` has it)", allow_module_level=True)

from pipeline.kernels import ahead, liif_triton
from pipeline.kernels.ahead import Shape, Usage, shapes, usage

NARROW = Shape("forward", 32, torch.bfloat16)
FINE = Usage(num_warps=4, registers=80, stack=0, spills=0, shared=4096, matrix={"HMMA": 20})


@pytest.mark.parametrize("arch", [80, 90])
def test_a_narrow_kernel_fits(arch: int) -> None:
    found = usage(NARROW, arch)
    assert found.problem(arch) == ""
    assert found.num_warps == 4 and 32 <= found.registers < 255 and 1024 <= found.shared < 32768
    assert sum(found.matrix.values()) > 4


def test_a_launch_that_is_too_large_is_a_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 rows of 128 float32 results by 4 warps are 256 registers a thread."""
    monkeypatch.setattr(liif_triton, "launch_for", lambda width: liif_triton.Launch(64, 4))
    shape = Shape("forward", 128, torch.bfloat16)
    found = usage(shape, 90)
    assert found.stack > 0 and found.spills > 0 and "spills" in found.problem(90)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"stack": 8}, "spills"),
        ({"spills": 1}, "spills"),
        ({"shared": 164 << 10}, "shared"),
        ({"matrix": {}}, "matrix"),
    ],
)
def test_what_must_not_be(change: dict[str, object], problem: str) -> None:
    assert FINE.problem(80) == ""
    assert problem in dataclasses.replace(FINE, **change).problem(80)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ahead.PARTS)
def test_one_kernel_for_all_sizes(part: str) -> None:
    """Training draws its targets' sizes: whether 16 divides one, or one is 1, must not be a kernel of its own."""
    shape = Shape(part, 16, torch.bfloat16)
    with ahead._kept(80) as kernels:
        for size, cells in (((5, 7), (3, 5)), ((32, 48), (16, 16)), ((16, 7), (4, 4)), ((1, 9), (1, 1))):
            ahead._launch(shape, size, cells)
    found = [kernel.hash for kernel in kernels if kernel.name == "_kernel"]
    assert len(found) == 4 and len(set(found)) == 1


def test_all_that_is_promised_is_compiled() -> None:
    for wanted in (shapes(True), shapes(False)):
        assert {(s.part, s.width) for s in wanted} == {(p, w) for p in ahead.PARTS for w in liif_triton.WIDTHS}
        assert {s.dtype for s in wanted} == set(liif_triton.DTYPES)
