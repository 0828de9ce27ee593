"""Averages of any length after the training (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models", CVPR 2024, section 3): two power-function averages are kept, and snapshots of them stored.

The average of exponent γ after step t weighs the weights of step τ by τ^γ (eq. 3): it forgets the beginning however
long a run is, which an exponential average does not. Its length σ is the deviation of that weighting in units of t. An
average of another length is the linear combination of stored ones whose weighting comes closest (least squares; their
section 3.2 and appendix C).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import require
from training.config import StageConfig
from training.ema import Ema, Fragment, assemble, to_tensors

LENGTHS = (0.05, 0.10)
"""Lengths σ of the averages that are kept, as in the paper."""
LONGEST = 0.28
"""Just below 1/√12, where all steps weigh alike."""


def exponent(length: float) -> float:
    """γ of the average of length σ: the largest root of γ³ + 7γ² + (16 - σ⁻²)γ + (12 - σ⁻²) (their algorithm 2).
    Raises `UserError` for a length that no such average has."""
    require(0.0 < length <= LONGEST, "length", length, f"0 < length <= {LONGEST}")
    inverse = length**-2.0
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def decay(step: int, gamma: float) -> float:
    """β of optimizer step `step` (1, 2, ...): (1 - 1/t)^(γ+1), their eq. 4. The first step takes the weights whole."""
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def inner_products(
    first_steps: np.ndarray, first_gammas: np.ndarray, steps: np.ndarray, gammas: np.ndarray
) -> np.ndarray:
    """⟨p_i, p_j⟩ of weightings (N,) with (M,) → (N,M) float64; p(τ) = (γ+1) τ^γ / t^(γ+1) on 0..t (algorithm 3)."""
    t_a, gamma_a = first_steps.astype(np.float64)[:, None], first_gammas.astype(np.float64)[:, None]
    t_b, gamma_b = steps.astype(np.float64)[None, :], gammas.astype(np.float64)[None, :]
    power = np.where(t_a < t_b, gamma_b, -gamma_a)
    ratio = (t_a / t_b) ** power
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def combination(snapshots: Sequence[tuple[int, float]], step: int, length: float) -> tuple[np.ndarray, float]:
    """Coefficients (N,) of the stored averages, given as (step, σ), whose sum comes closest to the average of `length`
    after `step`; and how far its weighting is from that one's, relative (L2). 0 where the average itself is stored.

    They sum to one, which the paper does not ask for: what training hardly moves then comes back as it is."""
    steps = np.array([s for s, _ in snapshots])
    gammas = np.array([exponent(sigma) for _, sigma in snapshots])
    at, gamma = np.array([step]), np.array([exponent(length)])
    overlaps = inner_products(steps, gammas, steps, gammas)
    wanted = inner_products(steps, gammas, at, gamma)[:, 0]
    whole = float(inner_products(at, gamma, at, gamma)[0, 0])
    # Lengths and steps differ by orders of magnitude: every weighting at length one keeps the system well-conditioned.
    scale = 1.0 / np.sqrt(np.diag(overlaps))
    right = np.stack([wanted, np.ones(len(wanted))], axis=1) * scale[:, None]
    solved, *_ = np.linalg.lstsq(overlaps * scale[:, None] * scale[None, :], right, rcond=1e-14)
    free, ones = (solved * scale[:, None]).T
    coefficients = free + (1.0 - free.sum()) / ones.sum() * ones  # least squares under the condition (Lagrange)
    rest = whole - 2.0 * coefficients @ wanted + coefficients @ overlaps @ coefficients
    return coefficients, float(np.sqrt(max(rest, 0.0) / whole))


class PowerAverages:
    """The kept averages beside the engine's exponential one, in the same pieces; none where no snapshots are wanted."""

    def __init__(self, fragments: list[Fragment], config: StageConfig) -> None:
        self.lengths = LENGTHS if config.power_ema_every else ()
        self._averages = [Ema(fragments) for _ in self.lengths]
        self._gammas = [exponent(length) for length in self.lengths]
        self.is_whole = True
        """Whether they go back to the first step. A run that went on without them has none any more."""

    def update(self, fragments: list[Fragment], step: int) -> None:
        """Take in the weights after optimizer step `step` (1, 2, ...)."""
        for average, gamma in zip(self._averages, self._gammas):
            average.update(fragments, decay(step, gamma))

    def fragments(self, like: list[Fragment]) -> dict[float, list[Fragment]]:
        """Length → its average, named and placed as `like`."""
        return {length: ema.fragments(like) for length, ema in zip(self.lengths, self._averages)}

    def tensors(self, like: list[Fragment]) -> dict[str, Tensor]:
        """For a checkpoint: keys "σ/start:name". Empty where nothing is kept."""
        found = self.fragments(like) if self.is_whole else {}
        return {f"{sigma:.3f}/{key}": t for sigma, parts in found.items() for key, t in to_tensors(parts).items()}

    def load(
        self, fragments: list[Fragment], parts: list[dict[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Continue from the workers' `tensors`; where a checkpoint has none, there are none from here on."""
        for length, average in zip(self.lengths, self._averages):
            mark = f"{length:.3f}/"
            own = [{k.removeprefix(mark): t for k, t in part.items() if k.startswith(mark)} for part in parts]
            self.is_whole = any(own)
            if self.is_whole:
                average.load(fragments, assemble(own, shapes))


@torch.no_grad()
def combined(parts: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Σ coefficient · weights by name, summed in float64 → float32."""
    total: dict[str, Tensor] = {}
    for coefficient, tensors in parts:
        for name, tensor in tensors.items():
            term = tensor.double() * coefficient
            total[name] = total[name] + term if name in total else term
    return {name: tensor.float() for name, tensor in total.items()}
