"""What training workers meet reaches whoever launched them: mistakes as mistakes, outages as what passes, lost machines
as what comes back. Without a cluster."""

from __future__ import annotations

import errno
import logging
import pickle
import types
from collections import Counter

import pytest
from botocore.exceptions import EndpointConnectionError
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from orchestration.cluster import cluster_size, ray_train
from orchestration.evaluation import on_ray
from orchestration.tracking.outages import Silent, is_outage
from pipeline import storage
from pipeline.errors import UserError, unreachable
from preprocess.workers import check_room, raised
from training.config import preset_to_dict
from training.presets import get_preset


def silence() -> UserError:
    cause = ConnectionError("refused")
    error = unreachable("s3://bucket/x", cause)
    error.__cause__ = cause
    return error


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Runs one worker whose training ends with an error → what it returns."""
    context = types.SimpleNamespace(get_world_size=lambda: 2)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    for name in ("handlers", "propagate", "level"):  # which a worker sets for its process
        monkeypatch.setattr(log := logging.getLogger("latentzoom"), name, getattr(log, name))
    arguments = {
        "stage": "denoiser", "preset": preset_to_dict(get_preset("debug")), "most_workers": 2, "data": "d",
        "run_dir": str(tmp_path), "bundle": None, "places": {}, "profile": 0, "reporter_spec": None, "engine": "ddp",
        "threads": 1, "device": "cpu", "channel": "x", "is_terminal": False,
    }  # fmt: skip

    def run(error: Exception) -> dict:
        def train(*_, **__):
            raise error

        monkeypatch.setattr(ray_train, "train", train)
        return ray_train._worker(arguments)

    return run


def test_an_outage_on_one_worker_is_one_for_all(worker):
    first = worker(silence())
    second = worker(RuntimeError("the other worker has gone"))  # what its group does to the main worker
    assert first == second and isinstance(ray_train._raised(second), Silent) and is_outage(ray_train._raised(second))


def test_a_mistake_on_one_worker_is_one_for_all(worker):
    worker(UserError("lr = -1 is not allowed"))
    found = worker(silence())
    assert found["error"] == "lr = -1 is not allowed" and not is_outage(ray_train._raised(found))


def test_a_store_that_is_silent_altogether_is_an_outage(worker, monkeypatch):
    def gone(*_):
        raise silence()

    first = []

    def exists(url):
        if first:
            gone()
        first.append(url)
        return False

    monkeypatch.setattr(storage, "exists", exists)
    monkeypatch.setattr(storage, "write_json", gone)
    assert is_outage(ray_train._raised(worker(silence())))


@pytest.mark.parametrize(("said", "is_one"), [("Connection refused", True), ("no such bucket", False)])
def test_an_outage_that_a_worker_met_is_one_in_the_process_that_asked(said, is_one):
    """Ray pickles what is raised, and pickling loses causes."""
    cause = ConnectionError(said) if is_one else PermissionError(errno.EACCES, said)
    error = unreachable("s3://bucket/x", cause)
    error.__cause__ = cause
    for _ in range(2):  # from one process to the next, and on
        error = pickle.loads(pickle.dumps(error))
        assert error.__cause__ is None and is_outage(error) is is_one and said in str(error)


def test_what_a_client_of_a_store_raises_on_a_worker_arrives_as_that():
    met = EndpointConnectionError(endpoint_url="http://store")
    arrived = raised(RayTaskError("work", "a traceback", met))
    assert arrived is met and is_outage(arrived)
    defect = RayTaskError("work", "a traceback", KeyError("x"))
    assert raised(defect) is defect


@pytest.mark.parametrize("lost", [True, False])
def test_training_that_lost_a_machine_meets_an_outage(monkeypatch, tmp_path, lost):
    """Its attempts are used up long before another machine is there."""
    left = [{"NodeID": f"{i}", "NodeManagerAddress": f"10.0.0.{i}", "Alive": True, "Resources": {"CPU": 4.0}}
            for i in range(2)]  # fmt: skip

    def fails(*_):
        left[1]["Alive"] = not lost
        raise WorkerGroupError("rank 1 died", {1: ActorUnavailableError("Socket closed", None)})

    monkeypatch.setattr("ray.nodes", lambda: left)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray_train, "start_ray", lambda **_: False)
    monkeypatch.setattr(ray_train, "fit", fails)
    monkeypatch.setattr("orchestration.cluster.cluster_size.NOTICE_S", 0.0)
    with pytest.raises(UserError, match="training denoiser failed on its workers 4 times") as error:
        ray_train.launch("denoiser", get_preset("debug"), data="d", run_dir=str(tmp_path), num_workers=2)
    assert is_outage(error.value) is lost and ("10.0.0.1 was lost" in str(error.value)) is lost


class Cluster:
    """As much of Ray as `await_machines` asks. Every second that passes is one of `there`."""

    def __init__(self, monkeypatch, there: list[float], *, lost: bool) -> None:
        self.there, self.clock, self.asked = there, 0.0, []
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": self.there[min(int(self.clock), len(there) - 1)]})
        monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": not lost}])
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: self.asked.append(len(bundles)))
        monkeypatch.setattr(cluster_size, "has_autoscaler", lambda: False)
        monkeypatch.setattr(cluster_size, "is_scaling", lambda: False)
        monkeypatch.setattr(cluster_size.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(cluster_size.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.clock += seconds


@pytest.fixture
def nodes(monkeypatch):
    """Machines that Ray tells of, and what its autoscaler may bring → to be filled."""
    found, limits = [], {}
    monkeypatch.setattr("ray.nodes", lambda: found)
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: limits or None)
    monkeypatch.setattr(
        "ray.cluster_resources", lambda: dict(sum((Counter(n["Resources"]) for n in found if n["Alive"]), Counter()))
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return found, limits


def test_gpus_that_are_still_starting_or_were_just_lost_are_planned_for(nodes):
    found, limits = nodes
    found.append({"Alive": True, "Resources": {"CPU": 4.0}})
    assert cluster_size.gpus_of_each(None, cluster_size.reachable_resources()) == 0
    limits |= {"CPU": 64, "GPU": 8}
    assert cluster_size.gpus_of_each(None, cluster_size.reachable_resources()) == 1
    limits.clear()
    found.append({"Alive": False, "Resources": {"CPU": 8.0, "GPU": 2.0}})
    assert cluster_size.gpus_of_each(None, cluster_size.reachable_resources()) == 1


def test_evaluation_that_no_machine_has_room_for_is_one_line(nodes):
    nodes[0].append({"Alive": True, "Resources": {"CPU": 2.0}})
    assert on_ray._place(2, None) == ({"num_cpus": 1, "num_gpus": 0.0}, "cpu")
    with pytest.raises(UserError, match="1 workers with 1 GPU each need 1 GPU, and Ray has 0"):
        on_ray._place(2, 1.0)


def test_shards_that_no_machine_has_room_for_are_one_line_and_waited_for_where_some_may_come(nodes, capsys):
    nodes[0].extend([{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"GPU": 1.0}}])
    check_room("preprocess", {"CPU": 1.0, "GPU": 0.0}, can_grow=False)
    needs = {"CPU": 1.0, "GPU": 1.0}  # which no single machine has
    with pytest.raises(UserError, match="each worker needs 1 CPU, 1 GPU, and no machine of the cluster has it"):
        check_room("preprocess", needs, can_grow=False)
    check_room("preprocess", needs, can_grow=True)
    assert capsys.readouterr().err.endswith("waiting for one\n")


def test_another_machine_in_place_of_a_lost_one_is_waited_for(monkeypatch, capsys):
    cluster = Cluster(monkeypatch, [1.0] * 60 + [2.0], lost=True)
    assert cluster_size.await_machines({"CPU": 1.0, "GPU": 0.0}, 2) == {"CPU": 2.0}
    assert "waiting for a lost machine's successor: 2 CPU needed, 1 CPU there" in capsys.readouterr().err
    assert cluster.asked == [2, 0]


def test_one_that_does_not_come_is_given_up(monkeypatch):
    cluster = Cluster(monkeypatch, [1.0], lost=True)
    assert cluster_size.await_machines({"CPU": 1.0}, 2) == {"CPU": 1.0} and 100 < cluster.clock < 140


def test_a_cluster_that_never_was_larger_is_not_waited_for(monkeypatch):
    cluster = Cluster(monkeypatch, [1.0], lost=False)
    assert cluster_size.await_machines({"CPU": 1.0}, 2) == {"CPU": 1.0} and cluster.clock <= cluster_size.FIRST_WORD_S
