"""Small data, small parts, and a way to train a stage on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stage_inputs import Shop, make_shop

from preprocess.shards.manifest import load_manifest
from training.config import override
from training.presets import debug
from training.run import TrainResult, train


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("shop"), debug())


@pytest.fixture(scope="session")
def sr_shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    model = dataclasses.replace(debug().model, task="sr", lr_size=8)
    return make_shop(tmp_path_factory.mktemp("sr-shop"), dataclasses.replace(debug(), model=model), num=8)


@pytest.fixture(scope="session")
def watched_shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """One with a split `val`, of several chunks."""
    shop = make_shop(tmp_path_factory.mktemp("watched-shop"), debug(), num=32, held_out=0.45)
    assert load_manifest(shop.data).splits == {"train": 21, "val": 11}
    return shop


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Results in the last bit depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture
def run_stage(shop: Shop, tmp_path: Path) -> Callable[..., TrainResult]:
    """Train a stage in this process: run_stage("align", "align.steps=6", run_dir=...)."""

    def run(stage: str, *settings: str, run_dir: Path | str | None = None, **options: object) -> TrainResult:
        return train(
            stage,
            override(shop.preset, list(settings)),
            data=str(options.pop("data", shop.pixels if stage == "autoencoder" else shop.data)),
            run_dir=str(run_dir or tmp_path / stage),
            bundle=None if stage == "autoencoder" else str(options.pop("bundle", shop.bundle)),
            device="cpu",
            **options,  # type: ignore[arg-type]
        )

    return run
