"""What a stage is estimated to take, beside what its own steps take: operations counted by torch while they run, and
the tensors that their backward passes keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from direct_settings import WITH_ENCODER, save_first_stage
from stage_inputs import Shop
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import training.figures
from pipeline.bundle import load_bundle
from training.config import Preset, override
from training.estimate import Estimate, estimate
from training.perceptual import PerceptualLoss, load_perceptual
from training.presets import debug
from training.run import TrainResult, train
from training.session import Session

SETTINGS = ["checkpoint_every=100", "grid_every=0", "log_every=1", "compile=false"]


@dataclass
class Taken:
    """Of each optimizer step its operations; of each backward pass the bytes kept for it."""

    flops: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def watch(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> Taken:
    taken, storages = Taken(), dict[int, torch.UntypedStorage]()
    counter = FlopCounterMode(display=False)
    end_step, backward = Session.end_step, Session.backward
    before = 0

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def watched_backward(self: Session, loss: Tensor, terms: dict[str, Tensor]) -> None:
        taken.kept.append(sum(storage.nbytes() for storage in storages.values()))
        backward(self, loss, terms)
        storages.clear()

    def watched_step(self: Session) -> None:
        nonlocal before
        storages.clear()  # of the discriminator's own pass
        taken.flops.append(counter.get_total_flops() - before)
        before = counter.get_total_flops()
        end_step(self)

    monkeypatch.setattr(Session, "backward", watched_backward)
    monkeypatch.setattr(Session, "end_step", watched_step)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    monkeypatch.undo()
    return taken


def sized(preset: Preset, stage: str, *settings: str) -> tuple[Preset, Estimate]:
    preset = override(preset, [f"{stage}.{s}" for s in (*SETTINGS, *settings)])
    return preset, estimate(stage, preset.stage(stage), preset.model, 1)


@pytest.mark.parametrize("balance", ["adaptive", "fixed"])
def test_stage_0_with_lpips_and_a_discriminator(
    monkeypatch: pytest.MonkeyPatch, shop: Shop, tmp_path: Path, balance: str
) -> None:
    """The discriminator takes part from the third step on."""
    terms = ["perceptual_weight=1", "lpips_weights=random", "adversarial_weight=0.5", "adversarial_start=2"]
    settings = ["steps=4", "global_batch=4", "micro_batch=2", f"adversarial_balance={balance}", *terms]
    preset, found = sized(shop.preset, "autoencoder", *settings)
    plain = sized(shop.preset, "autoencoder", *settings[:-4])[1]
    taken = watch(
        monkeypatch,
        lambda: train("autoencoder", preset, data=shop.pixels, run_dir=str(tmp_path), bundle=None, device="cpu"),
    )
    for step, flops in enumerate(taken.flops, 1):
        # Of the gradient by a picture that is given, the discriminator's first layer makes none.
        assert found.flops_at(step) == pytest.approx(flops, rel=0.05), step
    assert found.flops_per_step == pytest.approx(sum(taken.flops) / 4, rel=0.05)
    assert found.flops_at(2) > 1.5 * plain.flops_per_step and found.flops_at(3) > 1.05 * found.flops_at(2)
    # Two micro-batches a step; the largest is one of the last, with everything in it. Of LPIPS the estimate has the
    # truth's features too, which are there until the distance is.
    assert 0.95 * max(taken.kept) < found.activation_bytes < 1.3 * max(taken.kept)
    assert max(taken.kept) > 1.5 * plain.activation_bytes
    # VGG16's convolutions with their heads; of the discriminator weights, gradients and two moments.
    lpips = sum(p.numel() for p in load_perceptual("random", "", torch.device("cpu")).lpips.parameters())
    assert found.frozen_parameters == lpips
    assert found.state_bytes - plain.state_bytes == 4 * lpips + 16 * 2_766_529
    assert plain.flops_at(1) == plain.flops_at(4) == plain.flops_per_step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_lpips_keeps(precision: str) -> None:
    """Beside a decoder: the difference that the term makes, and what its network keeps for a window of that size."""
    settings = ["steps=2", "global_batch=2", "crop=24", "min_size=24", f"precision={precision}"]
    plain = sized(debug(), "decoder", *settings)[1]
    found = sized(debug(), "decoder", *settings, "perceptual_weight=1", "lpips_weights=random")[1]
    network: PerceptualLoss = load_perceptual("random", "", torch.device("cpu"), precision)  # type: ignore[arg-type]
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    made, truth = (torch.rand(2, 3, 24, 24, requires_grad=is_made) for is_made in (True, False))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(made, truth)
    real = sum(storage.nbytes() for storage in storages.values())
    assert found.activation_bytes - plain.activation_bytes == pytest.approx(real, rel=0.2)


def test_direct_super_resolution_with_drawn_conditions(
    monkeypatch: pytest.MonkeyPatch, shop: Shop, tmp_path: Path
) -> None:
    """A frozen encoder makes the latents of every step: its weights are there, and its work is done."""
    first = save_first_stage(str(tmp_path / "first"), override(debug(), WITH_ENCODER).model)
    settings = ["steps=6", "global_batch=4"]
    preset, found = sized(override(debug(), WITH_ENCODER), "decoder", *settings)
    taken = watch(
        monkeypatch,
        lambda: train("decoder", preset, data=shop.pixels, run_dir=str(tmp_path / "run"), bundle=first, device="cpu"),
    )
    assert found.flops_per_step == pytest.approx(sum(taken.flops) / 6, rel=0.1)
    encoder = sum(p.numel() for p in load_bundle(first).autoencoder.parameters())
    settings.append("validate_every=0")
    drawn, cached = (
        sized(override(debug(), WITH_ENCODER), "decoder", *settings, f"conditions={kind}")[1]
        for kind in ("drawn", "cached")
    )
    assert (cached.frozen_parameters, drawn.frozen_parameters) == (0, encoder)
    assert drawn.state_bytes - cached.state_bytes == 4 * encoder
    assert drawn.flops_per_step > 1.3 * cached.flops_per_step


def test_flop_utilisation_counts_the_discriminator_from_where_it_takes_part(
    monkeypatch: pytest.MonkeyPatch, run_stage: Callable[..., TrainResult], shop: Shop, tmp_path: Path
) -> None:
    settings = ["steps=4", "global_batch=4", "adversarial_weight=0.5", "adversarial_start=2"]
    preset, found = sized(shop.preset, "autoencoder", *settings)
    monkeypatch.setattr(training.figures, "peak_flops", lambda device, precision: 1e12)
    run_stage("autoencoder", *(f"autoencoder.{s}" for s in (*SETTINGS, *settings)))
    rows = [json.loads(line) for line in (tmp_path / "autoencoder/metrics.jsonl").read_text().splitlines()]
    done = [1e12 * row["mfu_percent"] / 100 / row["images_per_s"] * 4 for row in rows]
    assert done == pytest.approx([found.flops_at(step) for step in (1, 2, 3, 4)], rel=1e-6) and done[2] > 1.2 * done[1]
