"""What is switched on for CUDA, and where: decided on any machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_inputs import Shop
from torch import nn

from pipeline.bundle import build_autoencoder, build_decoder
from pipeline.liif import LiifHead
from training.config import StageConfig, override
from training.precision import frozen_dtype
from training.presets import debug
from training.reconstruction import Reconstruction
from training.run import train
from training.tuning import compile_where_it_pays, tune

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def restored() -> Iterator[None]:
    cudnn, dynamo = torch.backends.cudnn, torch._dynamo.config
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, dynamo.suppress_errors
    yield
    torch.set_float32_matmul_precision(before[0])
    cudnn.allow_tf32, cudnn.benchmark, dynamo.suppress_errors = before[1:]


@pytest.mark.parametrize(
    ("stage", "tries"), [("autoencoder", True), ("decoder", False), ("denoiser", True), ("align", True)]
)
def test_cuda_is_tuned_and_a_cpu_left_as_it_is(restored: None, stage: str, tries: bool) -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    tune(debug().stage(stage), CPU)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.benchmark
    tune(debug().stage(stage), CUDA)
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.benchmark == tries


@pytest.mark.parametrize(
    ("stage", "changes", "device", "expected"),
    [
        ("denoiser", {}, CUDA, True),
        ("align", {}, CUDA, True),
        ("decoder", {}, CUDA, False),  # a size of its own for every step
        ("denoiser", {"zero_stage": 3}, CUDA, False),
        ("denoiser", {}, CPU, False),
        ("denoiser", {"compile": False}, CUDA, False),
        ("decoder", {"compile": True}, CPU, True),
    ],
)
def test_compiled_where_it_pays_or_as_asked(
    restored: None, stage: str, changes: dict[str, Any], device: torch.device, expected: bool
) -> None:
    config: StageConfig = dataclasses.replace(debug().stage(stage), **changes)
    module = nn.Linear(2, 2)
    torch._dynamo.config.suppress_errors = False
    assert compile_where_it_pays(module, config, device) == expected
    assert (module._compiled_call_impl is not None) == expected
    assert torch._dynamo.config.suppress_errors == (expected and config.compile is None)


def test_the_first_stage_compiles_in_one_piece() -> None:
    """As on CUDA it is; the features of its last layer come along."""
    network = Reconstruction(build_autoencoder(debug().model))
    image, noise = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 8, 8)
    plain = network(image, noise)
    network.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        made, regulariser, features = network(image, noise)
        for tensor, expected in zip((made, regulariser, features), plain):
            torch.testing.assert_close(tensor, expected)
    torch.testing.assert_close(network.autoencoder.decoder.conv_out(features), made)
    assert not features.requires_grad


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_the_frozen_decoder_is_rendered_in_the_frozen_precision(
    monkeypatch: pytest.MonkeyPatch, sr_shop: Shop, tmp_path: Path, stage: str
) -> None:
    """As on CUDA in half precision; on a CPU it would be float32."""
    seen: set[torch.dtype] = set()
    grid = LiifHead.grid

    def watched(self: LiifHead, table: torch.Tensor, *places: Any, **options: Any) -> torch.Tensor:
        seen.add(table.dtype)
        return grid(self, table, *places, **options)

    monkeypatch.setattr("training.precision.frozen_dtype", lambda config, device: torch.bfloat16)
    monkeypatch.setattr(LiifHead, "grid", watched)
    words = ("steps=1", "precision=bf16", *(["teacher_steps=1"] if stage == "distill" else []))
    preset = override(sr_shop.preset, [f"{stage}.{word}" for word in words])
    train(stage, preset, data=sr_shop.data, bundle=sr_shop.bundle, run_dir=str(tmp_path / "run"), device="cpu")
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [("bf16", CUDA, torch.bfloat16), ("fp16", CUDA, torch.float16), ("bf16", CPU, torch.float32)],
)
def test_the_frozen_decoder_has_the_precision_of_the_fused_head(
    precision: Any, device: torch.device, expected: torch.dtype
) -> None:
    assert frozen_dtype(dataclasses.replace(debug().align, precision=precision), device) == expected


def test_under_autocast_the_head_s_table_is_of_the_kernel_s_type_and_pixels_come_back_exact() -> None:
    """So the fused kernel is taken in stage 2: it is for tables of half precision."""
    decoder = build_decoder(debug().model)
    assert decoder.config.kind == "liif"
    with torch.autocast("cpu", torch.bfloat16):
        features = decoder.features(torch.randn(1, 3, 8, 8))
        assert decoder.prepare(features).dtype == torch.bfloat16
        rendered = decoder.render(features, (20, 24))
    assert torch.isfinite(rendered).all()
