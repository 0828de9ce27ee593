"""The stage-2 losses equal the released implementation's where that is right: one sample at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from safetensors.torch import load_file
from torch import Tensor

from pipeline.importing.latent_diffusion import import_checkpoint
from pipeline.model import LatentZoom
from training.losses import alignment_loss, diffusion_weight, per_sample

DATA = Path(__file__).parent.parent / "data" / "released_small"
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())["losses"]
Kind = Literal["l1", "l2"]
KINDS: list[Kind] = ["l1", "l2"]


@pytest.fixture(scope="module")
def stage_two() -> dict[str, Tensor]:
    """What stage 2 compares, computed by our networks: latents and images, true and predicted, and the SNR."""
    v = load_file(str(DATA / "vectors.safetensors"))
    bundle = import_checkpoint(str(DATA / "model.safetensors"), str(DATA / "config.yaml"), "released", weights="raw")
    model = LatentZoom(bundle)
    eps_pred = model.denoise(v["x_noisy"], v["t"], v["condition"])
    x0_pred = model.schedule.to_x0(v["x_noisy"], eps_pred, v["t"])
    scale = model.config.scale_factor
    return {
        "z0": v["latent"] * scale,
        "x0_pred": x0_pred,
        "image": v["target_image"],
        "decoded": model.decode(x0_pred / scale, (v["target_image"].shape[2], v["target_image"].shape[3])),
        "snr": model.schedule.snr(v["t"]),
        "t": v["t"],
    }


def released_style_loss(prediction: Tensor, truth: Tensor, weight: Tensor, kind: Kind) -> Tensor:
    """The fault: a weight of shape (B,1,1,1) against a loss of shape (B,) spreads to (B,1,1,B)."""
    return (weight.reshape(-1, 1, 1, 1) * per_sample(prediction, truth, kind)).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sample", [0, 1])
def test_one_sample_at_a_time(kind: Kind, sample: int, stage_two: dict[str, Tensor]) -> None:
    one = {name: value[sample : sample + 1] for name, value in stage_two.items()}
    loss, dm, recon = alignment_loss(
        (one["x0_pred"], one["z0"]), (one["decoded"], one["image"]), diffusion_weight(one["snr"], kind), kind, 1.0, 1.0
    )
    expected = EXPECTED[kind][sample]
    assert int(one["t"]) == expected["t"]
    assert float(dm) == pytest.approx(expected["latent_term"], rel=1e-4)
    assert float(recon) == pytest.approx(expected["image_term"], rel=1e-4)
    assert float(loss) == pytest.approx(expected["total"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_mean_of_its_samples(kind: Kind, stage_two: dict[str, Tensor]) -> None:
    weight = diffusion_weight(stage_two["snr"], kind)
    loss, dm, recon = alignment_loss(
        (stage_two["x0_pred"], stage_two["z0"]), (stage_two["decoded"], stage_two["image"]), weight, kind, 2.0, 3.0
    )
    means = {term: sum(e[term] for e in EXPECTED[kind]) / 2 for term in ("latent_term", "image_term")}
    assert float(dm) == pytest.approx(means["latent_term"], rel=1e-4)
    assert float(recon) == pytest.approx(means["image_term"], rel=1e-4)
    assert float(loss) == pytest.approx(2 * means["latent_term"] + 3 * means["image_term"], rel=1e-4)


@pytest.mark.parametrize(("kind", "right", "released"), [("l1", 0.8251, 9.2401), ("l2", 1.1049, 526.05)])
def test_the_released_weighting_at_two_samples(
    kind: Kind, right: float, released: float, stage_two: dict[str, Tensor]
) -> None:
    """At B = 2 the released weighting is mean(w) · mean(error): the latent term at t = 37, 811."""
    weight = diffusion_weight(stage_two["snr"], kind)
    faulty = float(released_style_loss(stage_two["x0_pred"], stage_two["z0"], weight, kind))
    errors = per_sample(stage_two["x0_pred"], stage_two["z0"], kind)
    assert faulty == pytest.approx(float(weight.mean() * errors.mean()), rel=1e-5)
    assert faulty == pytest.approx(released, rel=1e-3)
    _, dm, _ = alignment_loss(
        (stage_two["x0_pred"], stage_two["z0"]), (stage_two["decoded"], stage_two["image"]), weight, kind, 1.0, 1.0
    )
    assert float(dm) == pytest.approx(right, rel=1e-3)
    # At B = 1 both agree, which is why the fault went unseen.
    alone = released_style_loss(stage_two["x0_pred"][:1], stage_two["z0"][:1], weight[:1], kind)
    assert float(alone) == pytest.approx(EXPECTED[kind][0]["latent_term"], rel=1e-4)
