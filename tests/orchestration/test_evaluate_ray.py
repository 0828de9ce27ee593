"""Evaluation on Ray workers gives the figures of one process, and errors come back as one line."""

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.evaluation.evaluate import evaluate
from orchestration.evaluation.on_ray import compute_on_ray
from orchestration.evaluation.spec import EvaluationSpec, ModelReference
from orchestration.ray_train import cpus_for_each
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("machines", "num_workers", "cpus"),
    [
        ([8], 2, 4),
        ([0, 8, 8, 8], 2, 8),  # not 12: no machine has that many
        ([0, 16, 4], 2, 8),
        ([2], 8, 0.25),
        ([0], 2, 1),  # machines start on demand
        ([0, 1, 1], 4, 1),
        ([], 1, 1),
    ],
)
def test_every_worker_finds_room_on_some_machine(machines, num_workers, cpus):
    assert cpus_for_each(machines, num_workers) == cpus


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def test_a_gpu_by_its_number_is_for_one_worker(monkeypatch):
    """A worker sees the GPU that it was given as its only one: "cuda:1" would fail in each of them."""
    monkeypatch.setattr("orchestration.evaluation.on_ray.start_ray", lambda: pytest.fail("Ray was started"))
    spec, model = EvaluationSpec(task="sr", scales=(4.0,)), ModelReference(uri="m", tracking_uri="", digest="d")
    with pytest.raises(UserError, match="cuda:1 names one GPU, .* each worker .*; use --device cuda, or leave out"):
        next(compute_on_ray(spec, model, None, [(0, 1), (1, 2)], 2, "cuda:1"))


@pytest.mark.slow
def test_workers_do_not_change_figures(tmp_path, data):
    bundle = make_bundle(tmp_path / "b", task="sr")
    spec = EvaluationSpec(task="sr", scales=(4.0,), num_steps=2, chunk_size=2, sr_mode="fixed-input", eta=1.0)
    alone, pictures = evaluate(bundle, data, spec, progress=False)
    spread, more = evaluate(bundle, data, spec, num_workers=2, progress=False)
    for one, two in zip(alone.figures, spread.figures, strict=True):
        assert (one.name, one.method, one.setting, one.num) == (two.name, two.method, two.setting, two.num)
        assert two.value == pytest.approx(one.value, rel=1e-3)
        assert two.low == pytest.approx(one.low, rel=1e-3)
    assert pictures.keys() == more.keys()
    with pytest.raises(UserError, match="needs a truth of 64 pixels"):
        impossible = EvaluationSpec(task="sr", scales=(8.0,), sr_mode="fixed-input", chunk_size=2)
        evaluate(bundle, data, impossible, num_workers=2, progress=False)
