"""Evaluation on Ray workers gives the figures of one process, and errors come back as one line."""

import numpy as np
import pytest
import ray
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.cluster.cluster_size import cpus_for_each
from orchestration.cluster.devices import own_device, worker_gpus
from orchestration.cluster.ray_train import start_ray
from orchestration.evaluation.evaluate import evaluate
from orchestration.evaluation.on_ray import _place, speed_on_ray
from pipeline.errors import UserError
from training.evaluation.spec import EvaluationSpec


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


@pytest.mark.parametrize(
    ("device", "asked", "gpus"),
    [("", None, None), ("", 0.0, 0.0), ("cpu", None, 0.0), ("cuda", None, 1.0), ("cuda:1", 0.5, 0.5)],
)
def test_the_device_of_workers_is_what_was_asked_for_or_the_clusters(device, asked, gpus):
    assert worker_gpus(device, asked) == gpus
    with pytest.raises(UserError, match="--device cpu and --gpus-per-worker 1 contradict"):
        worker_gpus("cpu", 1.0)


@pytest.fixture(scope="module")
def cluster():
    """One machine. Its GPUs are only believed in: where work is placed does not depend on what is seen from here."""
    assert start_ray(num_cpus=2, num_gpus=2)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_workers_take_gpus_where_the_cluster_has_some_and_this_machine_none(cluster):
    assert own_device("") == "cpu"
    assert _place(2, None) == ({"num_cpus": 1, "num_gpus": 1.0}, "cuda")
    assert _place(2, 0.0) == ({"num_cpus": 1, "num_gpus": 0}, "cpu")


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(7):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.slow
def test_workers_do_not_change_figures(tmp_path, data, cluster):
    bundle = make_bundle(tmp_path / "b", task="sr")
    spec = EvaluationSpec(task="sr", scales=(4.0,), num_steps=2, chunk_size=2, sr_mode="fixed-input", eta=1.0)
    alone, pictures = evaluate(bundle, data, spec, progress=False)
    spread, more = evaluate(bundle, data, spec, num_workers=2, gpus_per_worker=0, progress=False)
    for one, two in zip(alone.figures, spread.figures, strict=True):
        assert (one.name, one.method, one.setting, one.num) == (two.name, two.method, two.setting, two.num)
        assert two.value == pytest.approx(one.value, rel=1e-3)
        assert two.low == pytest.approx(one.low, rel=1e-3)
    assert pictures.keys() == more.keys()
    fps = speed_on_ray(spread, spec, bundle, gpus_per_worker=0).get("fps", "x4")  # where the workers are, not here
    assert fps.value > 0 and ", cpu, median of 3" in fps.protocol
    with pytest.raises(UserError, match="needs a truth of 64 pixels"):
        impossible = EvaluationSpec(task="sr", scales=(8.0,), sr_mode="fixed-input", chunk_size=2)
        evaluate(bundle, data, impossible, num_workers=2, gpus_per_worker=0, progress=False)
