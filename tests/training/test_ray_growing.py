"""A cluster that is just starting: training waits for the machines that its autoscaler starts, and only for those."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "orchestration"))
from ray_head import Head, alive_nodes, ray_head
from small_shop import Shop

from orchestration import cluster_size
from orchestration.ray_train import launch, start_ray
from pipeline.errors import UserError
from training.config import override

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """A head that runs no work, and room for one machine of two CPUs, which comes when it is asked for."""
    ray.shutdown()
    with ray_head(0, grows_by={"CPU": 2, "object_store_memory": 80_000_000}) as head:
        while not alive_nodes(head):
            time.sleep(0.2)
        monkeypatch.setenv("RAY_ADDRESS", head.gcs)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.environment["RAY_AUTH_TOKEN_PATH"])
        start_ray()
        while not cluster_size.has_autoscaler():
            time.sleep(0.2)
        yield head
        ray.shutdown()


def test_training_waits_for_machines_that_may_still_start(
    growing: Head, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ray.cluster_resources().get("CPU", 0.0) == 0.0
    preset = override(shop.preset, ["denoiser.steps=2"])
    run = {"data": shop.data, "bundle": shop.bundle, "cpus_per_worker": 1}
    result = launch("denoiser", preset, run_dir=str(tmp_path / "run"), num_workers=2, engine="ddp", **run)
    assert result.step == 2
    assert "waiting for the autoscaler: 2 CPU needed, 0 CPU there" in capfd.readouterr().err
    # One machine is all that it may start: nothing is pending then, so the wait ends with what is wrong.
    monkeypatch.setattr(cluster_size, "PATIENCE_S", 5.0)
    with pytest.raises(UserError, match="4 workers with 1 CPU each need 4 CPU, and Ray has 2"):
        launch("denoiser", preset, run_dir=str(tmp_path / "more"), num_workers=4, engine="ddp", **run)
