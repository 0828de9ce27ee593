"""Power-function averages, and averages of other lengths made of them: Karras et al., CVPR 2024, section 3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad
from scipy.stats import beta
from stage_inputs import Shop
from test_resume import command, start, wait_for

from orchestration.verbs import average
from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from training.ema import Ema, Fragment
from training.post_hoc import make_average
from training.power_ema import LENGTHS, combination, combined, decay, exponent, inner_products
from training.power_snapshots import read_snapshot, snapshot_steps
from training.run import TrainResult

Run = Callable[..., TrainResult]


def test_exponents_are_the_published_ones() -> None:
    """γ of σ = 5 %, 10 % and 15 % in the paper's section 3.1."""
    assert [round(exponent(sigma), 2) for sigma in (0.05, 0.10, 0.15)] == [16.97, 6.94, 3.56]
    for sigma in (0.02, 0.12, 0.28):  # the deviation of the beta distribution of density (γ+1) x^γ
        assert beta(exponent(sigma) + 1, 1).std() == pytest.approx(sigma, rel=1e-9)
    with pytest.raises(UserError, match=r"length = 0\.3"):
        exponent(0.3)


@pytest.mark.parametrize(("t_a", "gamma_a", "t_b", "gamma_b"), [(3, 6.9, 8, 17.0), (8, 6.9, 3, 17.0), (5, 2.0, 5, 2.0)])
def test_inner_products_are_the_integrals(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> None:
    def weighting(x: float, t: float, gamma: float) -> float:
        return (gamma + 1) * x**gamma / t ** (gamma + 1)

    expected = quad(lambda x: weighting(x, t_a, gamma_a) * weighting(x, t_b, gamma_b), 0, min(t_a, t_b))[0]
    found = inner_products(*(np.array([value]) for value in (t_a, gamma_a, t_b, gamma_b)))
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-9)


def walk(num_steps: int) -> torch.Tensor:
    """Weights that wander and settle, (steps, 50) float32."""
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(num_steps, 50, generator=generator) / torch.arange(1, num_steps + 1).sqrt()[:, None]
    return torch.randn(50, generator=generator) + moves.cumsum(0)


def test_kept_averages_weigh_the_steps_by_the_power_function() -> None:
    path, gamma = walk(300), exponent(0.1)
    ema = Ema([Fragment("w", (50,), 0, path[0])])
    for step in range(1, 301):
        ema.update([Fragment("w", (50,), 0, path[step - 1])], decay(step, gamma))
    edges = (torch.arange(301, dtype=torch.float64) / 300) ** (gamma + 1)
    expected = ((edges[1:] - edges[:-1])[:, None] * path.double()).sum(0)
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("length", "most"), [(0.03, 5e-3), (0.05, 1e-6), (0.07, 5e-4), (0.12, 5e-4), (0.2, 3e-3), (0.25, 2e-2)]
)
def test_any_length_is_the_directly_kept_average_within_the_error_that_is_told(length: float, most: float) -> None:
    """1000 steps, a snapshot of both averages every 20. By Cauchy and Schwarz two averages are no further apart than
    their weightings times the length of the path."""
    path = walk(1000)
    kept = {sigma: Ema([Fragment("w", (50,), 0, path[0])]) for sigma in (*LENGTHS, length)}
    stored: dict[tuple[int, float], torch.Tensor] = {}
    for step in range(1, 1001):
        for sigma, ema in kept.items():
            ema.update([Fragment("w", (50,), 0, path[step - 1])], decay(step, exponent(sigma)))
            if step % 20 == 0 and sigma in LENGTHS:
                stored[step, sigma] = ema.averages[0].clone()
    coefficients, error = combination(list(stored), 1000, length)
    made = combined((share, {"w": stored[key]}) for share, key in zip(coefficients, stored))["w"]
    direct = kept[length].averages[0]
    gamma = np.array([exponent(length)])
    own = float(inner_products(np.array([1000]), gamma, np.array([1000]), gamma)[0, 0]) ** 0.5
    bound = error * own * path.double().square().sum(0).sqrt() + 2e-5
    assert ((made - direct).abs() <= bound).all()
    assert error < most and float((made - direct).norm() / direct.norm()) < most + 1e-5
    others = [float((made - ema.averages[0]).norm()) for sigma, ema in kept.items() if sigma != length]
    assert min(others) > 10 * float((made - direct).norm())


SETTINGS = ["denoiser.steps=24", "denoiser.power_ema_every=4", "denoiser.checkpoint_every=5"]


@pytest.mark.slow
def test_a_killed_run_has_the_same_snapshots_and_gives_a_bundle_of_any_length(
    run_stage: Run, shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage("denoiser", *SETTINGS, run_dir=tmp_path / "whole")
    killed = start(command(shop, tmp_path / "killed", *SETTINGS))
    wait_for(killed, tmp_path / "killed/metrics.jsonl", '"step": 14,')
    killed.kill()
    killed.wait()
    averages = tmp_path / "killed/averages"
    (averages / "latentzoom-averages-x1").mkdir()  # as a kill while a snapshot is written leaves them
    for left in ("latentzoom-averages-x1/averages.safetensors", ".step-00000004.safetensors.1.tmp"):
        (averages / left).write_bytes(b"half")
    assert run_stage("denoiser", *SETTINGS, run_dir=tmp_path / "killed").resumed_from > 0
    assert [path for path in averages.iterdir() if not path.name.startswith("step-")] == []
    steps = snapshot_steps(str(tmp_path / "whole"))
    assert steps == snapshot_steps(str(tmp_path / "killed")) == [4, 8, 12, 16, 20, 24]
    for step in steps:
        one, other = (read_snapshot(str(tmp_path / name), step) for name in ("whole", "killed"))
        assert one.keys() == other.keys() == set(LENGTHS)
        assert all(torch.equal(one[sigma][name], other[sigma][name]) for sigma in one for name in one[sigma])

    # A length that was kept comes back as it was kept; another one lies between.
    out = str(tmp_path / "short")
    assert average.main([str(tmp_path / "whole"), "--length", "0.05", "--out", out]) == 0
    assert "average of length 0.05 after step 24, from 6 snapshots" in capsys.readouterr().out
    kept = read_snapshot(str(tmp_path / "whole"), 24)
    made = load_bundle(out)
    assert made.denoiser is not None and made.decoder is not None
    for name, tensor in made.denoiser.state_dict().items():
        torch.testing.assert_close(tensor, kept[0.05][name], rtol=0, atol=1e-6)
    assert "average of length 0.05 after step 24" in made.meta["weights"] and "length 0.05" in made.card
    between = make_average(str(tmp_path / "whole"), 0.07, str(tmp_path / "middle"))
    assert 0 < between.error < 0.05
    middle = load_file(tmp_path / "middle/denoiser.safetensors")
    apart = {s: sum(float((middle[n] - t).square().sum()) for n, t in kept[s].items()) ** 0.5 for s in kept}
    ends = sum(float((kept[0.05][n] - t).square().sum()) for n, t in kept[0.10].items()) ** 0.5
    assert 0 < max(apart.values()) < ends
    with pytest.raises(UserError, match=r"length = 0\.28 after step 4 cannot be made from the snapshots of step 4"):
        make_average(str(tmp_path / "whole"), 0.28, out, step=4, overwrite=True)
    with pytest.raises(UserError, match="holds another bundle already"):
        make_average(str(tmp_path / "whole"), 0.08, out)


def test_a_run_that_began_without_the_averages_says_that_it_has_none(
    run_stage: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_stage("denoiser", "denoiser.steps=2")
    with caplog.at_level("INFO", logger="latentzoom"):
        run_stage("denoiser", "denoiser.steps=6", "denoiser.power_ema_every=2")
    assert "no snapshots of power-function averages, since this run began without them" in caplog.text
    assert snapshot_steps(str(tmp_path / "denoiser")) == []
    manifest = json.loads((tmp_path / "denoiser/checkpoints/step-00000006/manifest.json").read_text())
    assert not any(name.startswith("power") for name in manifest["files"])
    with pytest.raises(UserError, match=r"holds no snapshots .*power_ema_every=N"):
        make_average(str(tmp_path / "denoiser"), 0.1, str(tmp_path / "out"))
