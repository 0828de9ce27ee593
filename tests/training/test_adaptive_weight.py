"""Stage 0's weighting is LDM's: the discriminator's adaptive weight, and the KL term's unit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stage_inputs import Shop
from torch import Tensor, nn

from pipeline import storage
from pipeline.bundle import build_autoencoder
from pipeline.errors import UserError
from training.config import AutoencoderStage, first_stage_unit, older_first_stage, override
from training.losses import adaptive_weight, kl_loss
from training.presets import debug
from training.reconstruction import Reconstruction
from training.request import TrainRequest
from training.run import TrainResult, make_context
from training.world import current_world

Run = Callable[..., TrainResult]


def reconstructed(seed: int = 0) -> tuple[Reconstruction, Tensor, Tensor, Tensor, Tensor]:
    """A small network, an image, its reconstruction with gradient, the moments and the last layer's input."""
    torch.manual_seed(seed)
    network = Reconstruction(build_autoencoder(debug().model))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    return network, image, *network(image, torch.randn(2, 3, 8, 8))


def ldm_weight(network: Reconstruction, reconstruction: Tensor, generator: Tensor) -> Tensor:
    """LDM's calculate_adaptive_weight: gradients of the last layer's weights by autograd, through the network."""
    weight = network.autoencoder.decoder.conv_out.weight
    one, other = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (reconstruction, generator))
    return (one.norm() / (other.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def test_the_whole_loss_is_ldms_divided_by_the_number_of_values() -> None:
    """L1 and KL summed as in LDM's contperceptual.py, against means and `first_stage_unit`."""
    network, image, made, moments, features = reconstructed()
    critic = nn.Conv2d(3, 1, 4, stride=2)
    generator = -critic(made).mean()
    summed = (made - image).abs().sum() / len(image)
    d_weight = ldm_weight(network, summed, generator)
    ldm = summed + 1e-6 * kl_loss(moments) + 0.5 * d_weight * generator

    unit = first_stage_unit("kl", 32)
    mean = (made - image).abs().mean()
    weight = adaptive_weight(mean, generator, made, features, unit)
    ours = mean + 1e-6 / unit * kl_loss(moments) + 0.5 * weight * generator
    torch.testing.assert_close(ours * unit, ldm, rtol=1e-4, atol=0)
    torch.testing.assert_close(weight * unit, d_weight, rtol=1e-4, atol=0)
    assert unit == 3 * 32 * 32 and float(d_weight) < 1e4


def test_both_losses_pull_equally_at_the_last_layer() -> None:
    network, image, made, _, features = reconstructed(1)
    mean, generator = (made - image).abs().mean(), 7.0 * made.square().mean()
    balanced = adaptive_weight(mean, generator, made, features, 1.0) * generator
    last = network.autoencoder.decoder.conv_out.weight
    one, other = (float(torch.autograd.grad(loss, last, retain_graph=True)[0].norm()) for loss in (mean, balanced))
    assert other == pytest.approx(one, rel=1e-2)
    strongest = adaptive_weight(1e9 * mean, generator, made, features, 10.0)
    assert float(strongest) == pytest.approx(1e4 / 10.0)  # LDM's bound, in its unit


def test_the_stage_reports_the_balance_and_can_do_without(run_stage: Run, tmp_path: Path) -> None:
    terms = [f"autoencoder.{t}" for t in ("adversarial_weight=0.5", "steps=2", "log_every=1", "precision=bf16")]
    adaptive = run_stage("autoencoder", *terms, run_dir=tmp_path / "adaptive")
    fixed = run_stage("autoencoder", *terms, "autoencoder.adversarial_balance=fixed", run_dir=tmp_path / "fixed")
    assert adaptive.metrics["balance"] > 0 and "balance" not in fixed.metrics
    first = {r.first_loss for r in (adaptive, fixed)}
    assert len(first) == 2
    metrics = [storage.read_bytes(f"{tmp_path}/{name}/metrics.jsonl").decode() for name in ("adaptive", "fixed")]
    assert '"balance"' in metrics[0]


def test_settings_of_older_runs_are_read_in_todays_unit() -> None:
    """An old run's figures mean what they meant: the KL weight stood beside a mean, the adversarial one was fixed."""
    model, old = debug().model, {"kl_weight": 1e-6, "crop": 0, "adversarial_weight": 0.1}
    assert older_first_stage(old, model) == {**old, "kl_weight": 1e-6 * 3072, "adversarial_balance": "fixed"}
    assert older_first_stage({**old, "crop": 16}, model)["kl_weight"] == pytest.approx(1e-6 * 768)
    assert older_first_stage({**old, "adversarial_weight": 0.0}, model)["adversarial_balance"] == "adaptive"
    vq = dataclasses.replace(model, autoencoder=dataclasses.replace(model.autoencoder, kind="vq"))
    assert older_first_stage(old, vq)["kl_weight"] == 1e-6
    new = {"kl_weight": 1e-6, "adversarial_balance": "adaptive"}
    assert older_first_stage(new, model) == new


def test_an_older_run_goes_on_with_its_own_weight_and_is_refused_with_another(shop: Shop, tmp_path: Path) -> None:
    """Its fingerprint as it was written then: no balance, the KL weight in the old unit."""

    def difference(kl_weight: float) -> str:
        preset = override(debug(), [f"autoencoder.kl_weight={kl_weight!r}"])
        request = TrainRequest(stage="autoencoder", preset=preset, data=shop.pixels, run_dir=str(tmp_path))
        identity = make_context(request, current_world("cpu")).identity
        older = json.loads(json.dumps(identity.fingerprint()))
        del older["settings"]["adversarial_balance"], older["settings"]["max_aspect"]
        older["settings"]["kl_weight"] = 1e-3
        return identity.difference(identity.completed(older, str(tmp_path)))

    assert difference(1e-3 * 3072) == ""
    assert difference(1e-3) == "kl_weight was 3.072, is 0.001"


def test_bad_values() -> None:
    with pytest.raises(UserError, match="adversarial_balance = 'equal' .* 'adaptive' or 'fixed'"):
        AutoencoderStage(adversarial_balance="equal")  # type: ignore[arg-type]
