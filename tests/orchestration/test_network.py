"""A pipeline of all steps on a network as it is: head, workers, S3 endpoint (moto's simulator) and MLflow at addresses
of their own, packets that get lost, links that are cut, machines that die. It ends as an undisturbed one does."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import network
import pytest
from netted_cluster import netted_cluster
from random_kills import FAULTS, Fault, content, differences, draw, faulty, play, prepared

from orchestration.cluster import jobs


@pytest.fixture
def networks():
    if reason := network.why_not():
        pytest.skip(f"no networks of our own: {reason}")


@pytest.mark.network
@pytest.mark.timeout(3600)
def test_a_pipeline_ends_the_same_where_packets_are_lost_links_are_cut_and_machines_die(networks, tmp_path):
    with prepared(tmp_path) as cluster:
        assert len(set(cluster.nodes())) == 3
        quiet = play(cluster, "quiet", [], {}, 1500)
        for machine in cluster.net.machines.values():
            machine.lose(0.1)
        faults = [
            Fault("pixels", 0.5, "cut", "store", 5.0),
            Fault("decoder", 0.6, "kill", "worker-1", 5.0),
            Fault("denoiser", 0.3, "cut", "worker-2", 20.0),
            Fault("evaluate", 0.5, "kill", "tracker", 5.0),
        ]
        rough = play(cluster, "rough", faults, quiet.seconds, 1800)
        lost = {name: machine.num_lost() for name, machine in cluster.net.machines.items()}
        for machine in cluster.net.machines.values():
            machine.lose(0)
        assert min(lost.values()) > 20, lost
        assert not differences(content(cluster, "quiet"), content(cluster, "rough"))
        assert rough.submissions == 1  # of these faults none ends the job


DRIVER = """
import time
import ray
from preprocess import workers

workers._QUIET_S = workers._BEGINS_S = 20  # more than twice as long as it takes to begin
ray.init()


class Slow:
    def __init__(self): time.sleep(8)
    def ready(self): return True
    def work(self, pieces):
        for piece in pieces:
            yield piece


pool = workers.ActorPool("pool", lambda: ray.remote(Slow).options(num_cpus=1).remote(), list("abcdef"), num_workers=2,
                         name_of=str, finished=str)
print("begun", flush=True)
print("news:", *sorted(news for _, news in pool.run()), "lost:", pool.num_lost, flush=True)
"""


@pytest.mark.network
@pytest.mark.timeout(900)
def test_workers_that_begin_while_the_head_is_cut_off_are_replaced(networks, monkeypatch, tmp_path):
    """Ray does not hear that they are there, and would wait for it for ever."""
    (tmp_path / "driver.py").write_text(DRIVER)
    with netted_cluster() as cluster:
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        environment = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}}
        command = f"{sys.executable} {tmp_path / 'driver.py'}"
        job = jobs.connect(cluster.address).submit_job(entrypoint=command, runtime_env=environment)
        network.wait_until(lambda: "begun" in cluster.job_log(job), "the job")
        time.sleep(4)
        with faulty(cluster.net.machines["head"], "cut"):
            time.sleep(18)
        network.wait_until(lambda: "news:" in cluster.job_log(job), "the end of the job", 300)
        assert "news: a b c d e f lost: " in cluster.job_log(job)  # mostly two; now and then a word comes through


@pytest.mark.slow
def test_a_machine_that_is_cut_off_says_nothing_and_comes_back(networks):
    with network.network() as net:
        machine = net.add("one")
        machine.start("python3", "-m", "http.server", "8000", "--bind", machine.address)
        network.wait_until(lambda: machine.listens(8000), "a web server on its own address")
        with faulty(machine, "cut"):
            assert not machine.listens(8000)
        network.wait_until(lambda: machine.listens(8000), "the web server after its cable is back")
        machine.lose(1.0)
        assert not machine.listens(8000) and machine.num_lost() > 0
        machine.lose(0)
        with faulty(machine, "kill"):
            assert not machine.listens(8000)
        network.wait_until(lambda: machine.listens(8000), "the web server of the new machine")


def test_faults_are_drawn_by_their_seed():
    steps = ["a", "b", "c"]
    found = draw(random.Random(3), steps, 200)
    assert found == draw(random.Random(3), steps, 200) != draw(random.Random(4), steps, 200)
    assert {(fault.what, fault.machine) for fault in found} == set(FAULTS)
    assert [fault.step for fault in found] == sorted(fault.step for fault in found)
