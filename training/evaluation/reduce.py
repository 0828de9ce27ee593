"""Arrays of all samples of an evaluation → figures with intervals, and notes about what could not be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pipeline.errors import UserError
from pipeline.metrics.bootstrap import mean_resamples, percentile_interval, spread_interval
from pipeline.metrics.gaussian import FeatureStatistics, frechet_distance, frechet_resamples
from pipeline.metrics.kid import kid, kid_resamples
from pipeline.metrics.manifold import manifold_samples
from training.evaluation.networks import FEATURE_FIGURES, describe
from training.evaluation.report import Figure, rounded
from training.evaluation.spec import EvaluationSpec

PSNR_TEXT = {
    "rgb": "PSNR per 8-bit picture, RGB, no border",
    "benchmark": "PSNR per 8-bit picture, BT.601 luma, border ceil(scale)",
    "div2k": "PSNR per 8-bit picture, RGB, border ceil(scale) + 6",
}
FID_TEXT = (
    "; biased upwards, the more the fewer samples: compare equal numbers only, the interval does not hold the bias"
)


def reduce(spec: EvaluationSpec, arrays: Mapping[str, np.ndarray]) -> tuple[list[Figure], list[str]]:
    """Arrays of all samples → figures with intervals, and notes about what could not be measured.

    One array, or one pair of feature arrays, is asked for at a time."""
    protocols, notes = describe(spec)
    figures = []
    for key in arrays:
        kind, *parts = key.split("|")
        if kind == "value":
            figures.append(_mean_figure(parts[0], parts[1], parts[2], arrays[key], protocols, spec.seed))
    for network in FEATURE_FIGURES:
        for key in [k for k in arrays if k.startswith(f"feature|{network}|real|")]:
            setting = key.rsplit("|", 1)[1]
            real, fake = arrays[key], arrays[f"feature|{network}|fake|{setting}"]
            more, why = _feature_figures(network, setting, real, fake, protocols[network], spec)
            figures += more
            notes += [n for n in why if n not in notes]
    return figures, notes


def _mean_figure(
    name: str, method: str, setting: str, values: np.ndarray, protocols: dict[str, str], seed: int
) -> Figure:
    if name.startswith("psnr_"):
        protocol = PSNR_TEXT[name.removeprefix("psnr_")]
    elif name == "ssim":
        protocol = "SSIM per 8-bit picture, RGB, Gaussian window 11, sigma 1.5"
    elif name == "selfssim":
        protocol = "SSIM of one latent at two sizes, the larger shrunk (anti-aliased bicubic)"
    else:
        protocol = protocols[name]
    return Figure.of_mean(name, method, setting, values, mean_resamples(values, seed=seed), protocol)


def _feature_figures(
    network: str, setting: str, real: np.ndarray, fake: np.ndarray, protocol: str, spec: EvaluationSpec
) -> tuple[list[Figure], list[str]]:
    wanted = FEATURE_FIGURES[network]
    if network == "random_vgg":  # stands in only for what has no weights
        wanted = tuple(w for w in wanted if not (spec.inception if w in ("fid", "kid") else spec.vgg16))
    suffix = "_random_vgg" if network == "random_vgg" else ""
    figures: list[Figure] = []
    notes: list[str] = []

    def add(name: str, value: float, interval: tuple[float, float], resamples: np.ndarray, more: str = "") -> None:
        figures.append(
            Figure(
                name=name + suffix,
                method="ours",
                setting=setting,
                value=value,
                low=interval[0],
                high=interval[1],
                protocol=protocol + more,
                num=len(fake),
                resamples=rounded(resamples),
            )
        )

    def measure(names: str, run: Callable[[], None]) -> None:
        try:
            run()
        except UserError as error:  # too few samples for it
            notes.append(f"{names}{suffix} {'are' if ' and ' in names else 'is'} left out: {error}")

    def fid() -> None:
        value = frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(fake))
        resamples = frechet_resamples(real, fake, seed=spec.seed)
        add("fid", value, spread_interval(value, resamples), resamples, FID_TEXT)

    def kernel_distance() -> None:
        value, _ = kid(real, fake, seed=spec.seed)
        resamples = kid_resamples(real, fake, seed=spec.seed)
        add("kid", value, spread_interval(value, resamples), resamples)

    def manifold() -> None:
        for name, each in manifold_samples(real, fake).items():
            resamples = mean_resamples(each, seed=spec.seed)
            add(name, float(each.mean()), percentile_interval(resamples), resamples)

    if "fid" in wanted:
        measure("fid", fid)
    if "kid" in wanted:
        measure("kid", kernel_distance)
    if "precision" in wanted:
        measure("precision and recall", manifold)
    return figures, notes
