"""The CPU path of the heads: the same function as the plain path, on any number of threads, in memory of one chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import DecoderConfig
from pipeline.decoder import ImplicitDecoder
from pipeline.geometry import Axis
from pipeline.kernels import cpu
from pipeline.kernels.threads import for_each
from pipeline.light import LightHead
from pipeline.liif import LiifHead
from pipeline.metrics.speed import measure
from pipeline.reference import render_reference

KINDS = ["liif", "light"]


def decoder_of(kind: str, width: int = 24, depth: int = 3) -> ImplicitDecoder:
    config = DecoderConfig(
        kind=kind,  # type: ignore[arg-type]
        base_width=8,
        width_mult=(1,),
        num_res_blocks=1,
        mid_attention=False,
        norm_groups=4,
        mlp_width=width,
        mlp_depth=depth,
        light_width=width,
        light_depth=depth,
    )
    torch.manual_seed(0)
    decoder = ImplicitDecoder(config, 3)
    for parameter in decoder.head.parameters():
        parameter.data.normal_(std=max(parameter.shape[-1], 2) ** -0.5)
    return decoder.eval()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_paper_sized_head_equals_the_plain_evaluation() -> None:
    torch.manual_seed(0)
    head, features = LiifHead(128, 256, 4).eval(), torch.randn(1, 128, 16, 16)
    with torch.no_grad():
        decoder = decoder_of("liif")
        decoder.head = head
        image, expected = decoder.render(features, (90, 70)), render_reference(head, features, (90, 70))
    assert float((image - expected).abs().max()) < 1e-5
    assert float(expected.std()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "size", "chunk"), [(5, (9, 7), 200), (3, (33, 20), 64), (1, (3, 200), 50), (2, (1, 1), None)]
)
def test_equals_the_path_with_gradient(kind: str, batch: int, size: tuple[int, int], chunk: int | None) -> None:
    """Several images a block, several rows a block, and several blocks a row."""
    decoder, features = decoder_of(kind), torch.randn(batch, 8, 4, 5)
    expected = decoder.render(features, size)  # parameters require gradient: the plain path
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.allclose(decoder.render(features, size, chunk=chunk), expected.detach(), atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: str, two_threads: None) -> None:
    decoder, features = decoder_of(kind), torch.randn(2, 8, 4, 5)
    with torch.inference_mode():
        table = decoder.prepare(features)
        both = decoder.render_table(table, (40, 30), chunk=128)
        torch.set_num_threads(1)
        assert torch.equal(decoder.render_table(table, (40, 30), chunk=64), both)


def test_without_the_fused_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of PyTorch without oneDNN."""
    decoder, features = decoder_of("liif"), torch.randn(1, 8, 4, 5)
    with torch.no_grad():
        expected = decoder.render(features, (20, 31))
        monkeypatch.setattr(cpu, "linear_relu", cpu._plain_linear_relu)
        assert torch.allclose(decoder.render(features, (20, 31)), expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["light", pytest.param("liif", marks=pytest.mark.slow)])
def test_extra_memory_is_that_of_the_chunk(kind: str, two_threads: None) -> None:
    """Growth of the process beyond the image itself, at 512² and at 4096². Whole-image activations of this narrow head
    would take two gigabytes."""
    decoder, features = decoder_of(kind, width=8, depth=2), torch.randn(1, 8, 8, 8)

    def extra_bytes(side: int) -> int:
        def run() -> None:
            with torch.inference_mode():
                decoder.render(features, (side, side))

        peak = measure(run, num=1, warm_up=0)[1]
        if peak is None:
            pytest.skip("this system does not tell a process's peak memory")
        return peak - 3 * 4 * side * side

    assert extra_bytes(512) < 48 << 20
    assert extra_bytes(4096) < 48 << 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_grad", [False, True])
def test_a_wide_window_is_cut_within_its_rows(kind: str, with_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain path: no block has more pixels than the chunk, though one row has."""
    decoder, features = decoder_of(kind).double(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    head, sizes = decoder.head, []
    evaluate = head._block

    def watched(table: torch.Tensor, rows: Axis, cols: Axis) -> torch.Tensor:
        sizes.append(len(table) * len(rows) * len(cols))
        return evaluate(table, rows, cols)

    monkeypatch.setattr(head, "_block", watched)
    with torch.set_grad_enabled(with_grad):
        whole = decoder.render(features, (3, 500), chunk=10**6)
        assert sizes == [2 * 3 * 500]
        sizes.clear()
        assert torch.allclose(decoder.render(features, (3, 500), chunk=64), whole, atol=1e-12)
    assert sum(sizes) == 2 * 3 * 500 and max(sizes) <= 64


def test_light_needs_fifty_times_fewer_operations_than_liif() -> None:
    with torch.device("meta"):
        liif, light = (ImplicitDecoder(DecoderConfig(kind=kind), 3).head for kind in ("liif", "light"))
    for scale in (8, 16, 100):
        assert liif.macs_per_pixel(scale) > 50 * light.macs_per_pixel(scale)


@pytest.mark.parametrize(("head", "num_blended"), [(LiifHead(12, 16, 3), 4), (LightHead(12, 16, 3), 12)])
def test_operations_are_counted_as_pytorch_counts_them(head: LiifHead | LightHead, num_blended: int) -> None:
    """The matrix products of the plain path at ×8, by PyTorch's own counter, and the blend, which it does not see."""
    decoder = decoder_of("liif")
    decoder.head = head
    with FlopCounterMode(display=False) as counter:
        decoder.render(torch.randn(1, 12, 6, 6), (48, 48))
    counted = counter.get_total_flops() / 2 / 48**2
    assert head.macs_per_pixel(8) == pytest.approx(counted + num_blended * head.width, rel=1e-3)


def test_pieces_run_once_each_and_errors_come_back(two_threads: None) -> None:
    done: list[int] = []
    for_each(done.append, list(range(200)))
    assert sorted(done) == list(range(200))
    seen: set[str] = set()

    def fail(piece: int) -> None:
        seen.add(threading.current_thread().name)
        if piece == 3:
            raise ValueError("third")

    with pytest.raises(ValueError, match="third"):
        for_each(fail, list(range(100)))
    assert threading.main_thread().name not in seen
    assert torch.get_num_threads() == 2
