"""The Triton kernel in Triton's interpreter, against the plain path; and that a missing kernel is never an error."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import liif
from pipeline.geometry import axis_range
from pipeline.liif import LiifHead

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (it comes with CUDA builds of torch)")


@needs_triton
@pytest.mark.parametrize("program", ["interpret_kernel.py", "interpret_gradient.py"])
def test_kernel_in_the_interpreter(program: str) -> None:
    """In a process of its own: whether kernels are interpreted is decided when Triton is imported."""
    run = subprocess.run([sys.executable, str(Path(__file__).with_name(program))], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("cases agree")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = LiifHead(128, 256, 4).cuda().eval()
    features = torch.randn(2, 128, 16, 12, device="cuda")
    rows = axis_range(3, 90, 100, 16, dtype=torch.float32, device=features.device)
    cols = axis_range(0, 77, 77, 12, dtype=torch.float32, device=features.device)
    with torch.no_grad():
        expected = head._block(head.table(features), rows, cols)
        image = head.to(dtype).grid(head.table(features.to(dtype)), rows, cols)
    assert image.dtype == dtype
    allowed = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert float((image - expected).abs().max()) < allowed


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_gradient_on_a_gpu(dtype: torch.dtype, is_frozen: bool) -> None:
    """Errors relative to the gradient's norm, no worse than twice those of the plain path in the same type."""
    torch.manual_seed(0)
    head, features = LiifHead(128, 256, 4).cuda().requires_grad_(not is_frozen), torch.randn(2, 128, 16, 12).cuda()
    rows = axis_range(3, 90, 100, 16, dtype=torch.float32, device=features.device)
    cols = axis_range(0, 77, 77, 12, dtype=torch.float32, device=features.device)

    def gradients(head: LiifHead, features: torch.Tensor, chunk: int | None) -> list[torch.Tensor]:
        features = features.detach().requires_grad_()
        image = head.grid(head.table(features), rows, cols, chunk=chunk)
        loss = (image.float() * torch.linspace(-9, 9, image.numel()).sin().reshape(image.shape).cuda()).sum()
        return list(torch.autograd.grad(loss, [features, *(p for p in head.parameters() if p.requires_grad)]))

    exact = gradients(copy.deepcopy(head).double(), features.double(), 10**6)
    low = copy.deepcopy(head).to(dtype)
    for value, usual, here in zip(*(exact, *(gradients(low, features.to(dtype), c) for c in (10**6, None)))):
        error, usual_error = (float((x.double() - value).norm() / value.norm()) for x in (here, usual))
        assert error < 2 * usual_error + 1e-5


class OnSecond(torch.Tensor):
    """A CPU tensor that says it is on the second GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 1)


def test_the_kernel_runs_on_the_device_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which is the first one unless somebody says otherwise."""
    now: list[torch.device] = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        now.append(wanted)
        yield
        now.pop()

    seen: list[torch.device] = []

    def fused(*_: object) -> torch.Tensor:
        seen.append(now[-1])
        return torch.zeros(1)

    head = LiifHead(8, 16, 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(head, "_fused", fused)
    rows, cols = (axis_range(0, n, n, 4, dtype=torch.float32, device=torch.device("cpu")) for n in (9, 7))
    head.grid(torch.zeros(1, 4, 4, 16).as_subclass(OnSecond), rows, cols)
    assert seen == [torch.device("cuda", 1)] and now == [torch.device("cuda", 0)]


def test_a_kernel_that_fails_gives_way_to_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(liif, "_failed", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert liif._try_kernel("float32", broken) is None
        assert liif._try_kernel("float32", broken) is None
    assert len(seen) == 1 and "out of resources" in str(seen[0].message)
    assert liif._try_kernel("bfloat16", lambda: torch.ones(1)) is not None  # another shape still runs
