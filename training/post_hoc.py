"""A bundle of any averaging length, made after the training from the run's snapshots (`training.power_ema`)."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import storage
from pipeline.bundle import UNFINISHED, Bundle, load_bundle, load_strict, save_bundle
from pipeline.card import model_card
from pipeline.errors import UserError
from training.averaged import weights_by_part
from training.newest import NEWEST
from training.power_ema import LENGTHS, combination, combined
from training.power_snapshots import read_snapshot, snapshot_steps

LARGEST_ERROR = 0.1
"""Of the weighting, relative: beyond it the average would be of another length than it is called."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """What was made. error: how far the weighting of the steps is from the wanted one, relative (L2)."""

    bundle: str
    step: int
    length: float
    snapshots: int
    error: float


def make_average(run_dir: str, length: float, out: str, *, step: int = 0, overwrite: bool = False) -> Average:
    """The bundle of the stage's run `run_dir` with the power-function average of `length` (σ, in parts of the training)
    after `step`, by default that of the newest snapshot → `out`. The other parts are those of the run's own bundle.

    Snapshots up to `step` are used. Raises `UserError` where there are none, where the length cannot be made from them
    (`LARGEST_ERROR`), where the run has no bundle yet, and where `out` holds another bundle and `overwrite` is not set.
    """
    there = snapshot_steps(run_dir)
    if not there:
        raise UserError(
            f"{run_dir} holds no snapshots of power-function averages; train with --set STAGE.power_ema_every=N, best "
            "with some tens of snapshots over the run"
        )
    step = step or there[-1]
    steps = [found for found in there if found <= step]
    if not steps:
        raise UserError(f"step = {step} lies before the first snapshot; {run_dir} has some of {_listed(there)}")
    keys = [(found, sigma) for found in steps for sigma in LENGTHS]
    coefficients, error = combination(keys, step, length)
    if error > LARGEST_ERROR:
        raise UserError(
            f"length = {length:g} after step {step} cannot be made from the snapshots of {_listed(steps)}: the "
            f"weighting would be off by {100 * error:.0f} %; take a step that has a snapshot, another length, or train "
            "with more snapshots"
        )
    run = storage.read_json(storage.join(run_dir, "run.json"))
    bundle = load_bundle(storage.join(run_dir, NEWEST))
    shares = dict(zip(keys, coefficients.tolist()))
    whole = combined(
        (shares[found, sigma], tensors)
        for found in steps
        for sigma, tensors in read_snapshot(run_dir, found).items()  # one at a time: they may be gigabytes
    )
    is_joint = run["settings"].get("decoder") == "implicit"
    for part, tensors in weights_by_part(run["stage"], whole, joint=is_joint).items():
        load_strict(getattr(bundle, part), tensors, f"the snapshots of {run_dir}")
    save_bundle(out, _described(bundle, run["stage"], step, length), overwrite=overwrite)
    return Average(bundle=out, step=step, length=length, snapshots=len(steps), error=error)


def _described(bundle: Bundle, stage: str, step: int, length: float) -> Bundle:
    """The bundle with a meta and a card that say what its weights are."""
    stages = dict(bundle.meta.get("stages", {}))
    stages[stage] = {**stages.get(stage, {}), "steps": step}
    words = f"power-function average of length {length:g} after step {step} of {stage}"
    meta = {**{k: v for k, v in bundle.meta.items() if k != UNFINISHED}, "weights": words, "stages": stages}
    bundle.meta, bundle.card = meta, model_card(bundle.config, meta)
    return bundle


def _listed(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
