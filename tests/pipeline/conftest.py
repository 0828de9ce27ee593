"""Fixtures of the pipeline's tests: numbers of the released implementation and small models with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import Released, small_bundle

from pipeline.importing.latent_diffusion import import_checkpoint
from pipeline.model import LatentZoom

DATA = Path(__file__).parent.parent / "data" / "released_small"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def released() -> Released:
    weights, config = str(DATA / "model.safetensors"), str(DATA / "config.yaml")
    return Released(
        load_file(str(DATA / "vectors.safetensors")),
        load_file(weights),
        config,
        LatentZoom(import_checkpoint(weights, config, "released")),
        LatentZoom(import_checkpoint(weights, config, "released", weights="raw")),
    )


@pytest.fixture(scope="session")
def small() -> LatentZoom:
    return LatentZoom(small_bundle())


@pytest.fixture(scope="session")
def small_sr() -> LatentZoom:
    return LatentZoom(small_bundle("sr"))
