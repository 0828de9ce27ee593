"""Min-SNR weighting of denoising pre-training (Hang et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.config import ScheduleConfig
from pipeline.diffusion import Schedule
from pipeline.errors import UserError
from training.config import DenoiserStage
from training.losses import Kind, denoising_loss, min_snr_weight, per_sample
from training.run import TrainResult

Run = Callable[..., TrainResult]
T = torch.tensor([0, 3, 50, 300, 700, 998])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_whatever_is_predicted_the_error_of_z0_has_the_weight_min_snr_gamma(prediction: str, kind: str) -> None:
    """A wrong prediction, its z0, and the two weighted errors, sample by sample."""
    schedule = Schedule(ScheduleConfig(prediction=prediction))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    z0, eps, error = (torch.randn(len(T), 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    z_t, target = schedule.add_noise(z0, eps, T), schedule.target(z0, eps, T)
    made = target + error
    snr = schedule.snr(T)
    weighted = min_snr_weight(snr, prediction, 5.0, kind) * per_sample(made, target, kind)  # type: ignore[arg-type]
    clean = schedule.to_x0(z_t, made, T)
    expected = snr.clamp(max=5.0)
    expected = expected.sqrt() if kind == "l1" else expected
    torch.testing.assert_close(weighted, expected * per_sample(clean, z0, kind), rtol=1e-4, atol=0)  # type: ignore[arg-type]


def test_the_weights_of_the_paper() -> None:
    snr = torch.tensor([0.1, 5.0, 100.0])
    assert min_snr_weight(snr, "eps", 5.0).tolist() == pytest.approx([1.0, 1.0, 0.05])
    assert min_snr_weight(snr, "x0", 5.0).tolist() == pytest.approx([0.1, 5.0, 5.0])
    assert min_snr_weight(snr, "v", 5.0).tolist() == pytest.approx([0.1 / 1.1, 5 / 6, 5 / 101])


def test_weights_belong_to_their_samples_and_none_is_the_plain_mean() -> None:
    made, target = torch.zeros(2, 3, 4, 4), torch.stack([torch.ones(3, 4, 4), torch.full((3, 4, 4), 2.0)])
    assert float(denoising_loss(made, target, weight=torch.tensor([1.0, 0.25]))) == pytest.approx(1.0)
    assert float(denoising_loss(made, target)) == pytest.approx(2.5)


def test_the_stage_weighs_its_loss(run_stage: Run, tmp_path: Path) -> None:
    """With eps and a bound above every ratio all weights are 1; with a small one the same first error counts less."""
    first = {
        gamma: run_stage(
            "denoiser", "denoiser.steps=1", f"denoiser.min_snr_gamma={gamma}", run_dir=tmp_path / str(gamma)
        ).first_loss
        for gamma in (0, 1e6, 0.5)
    }
    assert first[1e6] == pytest.approx(first[0], rel=1e-5) and first[0.5] < 0.9 * first[0]


def test_the_stage_takes_the_root_of_weights_where_errors_are_absolute(
    run_stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: dict[str, torch.Tensor] = {}

    def watched(prediction: torch.Tensor, target: torch.Tensor, kind: Kind, weight: torch.Tensor) -> torch.Tensor:
        weights[kind] = weight
        return denoising_loss(prediction, target, kind, weight)

    monkeypatch.setattr("training.stages.denoiser.denoising_loss", watched)
    for kind in ("l1", "l2"):
        settings = ["denoiser.steps=1", "denoiser.min_snr_gamma=0.5", f"denoiser.loss={kind}"]
        run_stage("denoiser", *settings, run_dir=tmp_path / kind)
    assert float(weights["l2"].min()) < 0.5
    torch.testing.assert_close(weights["l1"], weights["l2"].sqrt())


def test_bad_values(run_stage: Run) -> None:
    with pytest.raises(UserError, match="min_snr_gamma = -1"):
        DenoiserStage(min_snr_gamma=-1)
    settings = ["denoiser.min_snr_gamma=5", "model.schedule.prediction=v", "model.schedule.zero_terminal_snr=true"]
    with pytest.raises(UserError, match=r"min_snr_gamma = 5 gives no weight to the last step .* set one of them"):
        run_stage("denoiser", *settings)
