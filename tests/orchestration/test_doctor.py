"""`latentzoom doctor`: each trouble is found, named in one line with what to do, and decides the exit status."""

from __future__ import annotations

import http.server
import re
import threading
import time
import uuid
from pathlib import Path

import pytest
from ray_head import ray_head

from orchestration.cli import main
from orchestration.cluster import jobs
from orchestration.doctor import machine as doctor
from orchestration.doctor import servers as doctor_servers
from orchestration.doctor import torch_builds
from orchestration.tracking import store as tracking


def levels(findings):
    return [f.level for f in findings]


def test_a_sound_machine_has_no_trouble(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["doctor", "--storage", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for topic in ("versions", "devices", "disk", "shm", "files", "token", "storage"):
        assert f" {topic} " in text
    assert not list(tmp_path.glob(".latentzoom-doctor-*"))


def test_a_store_that_refuses_is_trouble(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    (finding,) = doctor.store(str(blocked / "below"))
    assert finding.level == "trouble" and "cannot write to" in finding.text and finding.todo
    (finding,) = doctor.store("nosuch://bucket")
    assert finding.level == "trouble"


def test_the_probe_of_a_store_leaves_no_folder_of_its_own(tmp_path):
    (finding,) = doctor.store(str(tmp_path / "new" / "deeper"))
    assert finding.level == "ok" and not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    (finding,) = doctor.store(str(tmp_path / "empty"))
    assert finding.level == "ok" and (tmp_path / "empty").is_dir()


def test_an_address_that_nothing_can_open_is_one_finding_among_the_others(capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["doctor", "--storage", "nosuch://bucket"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("TROUBLE")] == [line for line in lines if "nosuch://" in line]
    assert any(" devices " in line for line in lines)


def test_an_object_store_is_tried_with_conditional_writes():
    (finding,) = doctor.store(f"memory://{uuid.uuid4().hex}")
    assert finding.level == "ok"


def test_small_shared_memory_and_open_tokens_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 64 << 20, "free": 1})())
    (finding,) = doctor.shared_memory(str(tmp_path))
    assert finding.level == "trouble" and "--shm-size" in finding.todo
    assert set(levels(doctor.disks())) == {"warning"}
    token = tmp_path / "token"
    token.write_text("abc")
    token.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    (finding,) = doctor.ray_token()
    assert finding.level == "warning" and finding.todo == f"chmod 600 {token}" and "abc" not in finding.line()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert levels(doctor.ray_token()) == ["trouble"]


def test_other_versions_than_the_locked_ones_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "_lock", lambda: {"ray": "1.0"})
    (finding,) = doctor.versions()
    assert "the lock has 1.0" in finding.text and "ray==1.0" in finding.todo


def test_the_lock_of_this_checkout_is_the_one_compared_with():
    locked = doctor._lock()
    assert set(doctor._LOCKED) - set(locked) == {"torch"}  # torch is chosen apart from the lock


class OpenServer(http.server.BaseHTTPRequestHandler):
    """Answers everything to anyone, with a clock an hour late."""

    def do_GET(self) -> None:
        self.send_response_only(200)
        self.send_header("Date", self.date_time_string(int(time.time()) - 3600))
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def open_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OpenServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_servers_open_to_anyone_and_wrong_clocks_are_trouble(open_server):
    (finding,) = doctor_servers._stranger(open_server)
    assert finding.level == "trouble" and "without a password" in finding.text
    (finding,) = doctor_servers.clock(open_server)
    assert finding.level == "trouble" and " s ahead of" in finding.text
    assert doctor_servers.head("http://127.0.0.1:1")[0].level == "trouble"


@pytest.mark.parametrize("uri", ["postgresql+psycopg://joe:hunter2@127.0.0.1:1/x", "a-folder"])
def test_a_tracking_store_that_mlflow_cannot_open_is_one_finding(tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    (finding,) = doctor_servers.tracking_server(uri)
    assert finding.level == "trouble" and finding.line().count("\n") == 0 and finding.todo
    assert "hunter2" not in finding.line()


def test_looking_at_a_store_does_not_make_one(tmp_path):
    (finding,) = doctor_servers.tracking_server(f"sqlite:///{tmp_path}/none/mlflow.db")
    assert finding.level == "trouble" and f"there is no store at {tmp_path}/none/mlflow.db" in finding.text
    assert list(tmp_path.iterdir()) == []


def test_an_address_with_a_slash_at_its_end_is_the_same_head(open_server):
    assert [f.text for f in doctor_servers.head(f"{open_server}/")] == [
        f.text for f in doctor_servers.head(open_server)
    ]


@pytest.mark.slow
def test_a_cluster_is_checked_from_outside_and_on_every_node(tmp_path, monkeypatch, capfd):
    with ray_head() as head:
        monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
        tracking.make_store(f"sqlite:///{tmp_path}/mlflow.db")
        assert main(["doctor", "--address", head.address, "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 0
        text = capfd.readouterr().out
        assert "refuses strangers (401)" in text and "takes this token" in text and "agrees with" in text
        assert "tracking" in text
        arguments = ["submit", "doctor", "--nodes", "--storage", str(tmp_path), "--address", head.address]
        assert main(arguments) == 0
        text = capfd.readouterr().out
        assert "cluster    1 nodes, 2 CPU" in text
        assert text.count("] /dev/shm has") == 1 and text.count("/dev/shm has") == 2  # the driver's machine, the node
        assert jobs.connect(head.address).list_jobs()[0].runtime_env.get("pip") is None


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        ("580.65.06", "pip install --index-url https://download.pytorch.org/whl/cu130 torch==2.13.0"),
        ("550.54.15", "pip install --index-url https://download.pytorch.org/whl/cu126 torch==2.13.0"),
        ("470.82.01", "update the driver: the oldest that torch 2.13.0 runs on is 525.60"),
        ("580.65.06, 7.0", "pip install --index-url https://download.pytorch.org/whl/cu126 torch==2.13.0"),  # Volta
        ("570.86.15, 12.0", "update the driver: the oldest that torch 2.13.0 runs on with this GPU is 580.65"),
        ("580.65.06, 3.7", "no build of torch 2.13.0 has code for this GPU"),
        ("580.65.06, [N/A]", "pip install --index-url https://download.pytorch.org/whl/cu130 torch==2.13.0"),
        ("", "look at `nvidia-smi`"),
    ],
)
def test_a_driver_that_torch_does_not_use_gets_the_build_that_it_runs(tmp_path, monkeypatch, driver, says):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n{f'echo {driver}' if driver else 'exit 9'}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = doctor.devices()
    assert finding.level == "trouble" and says in finding.todo and driver.partition(",")[0] in finding.text


@pytest.mark.parametrize(
    ("capability", "archs", "level"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"], "ok"),
        ((8, 9), ["sm_75", "sm_80", "sm_86", "sm_90"], "ok"),  # as sm_86
        ((7, 0), ["sm_75", "sm_80", "sm_90"], "trouble"),
        ((12, 0), ["sm_50", "sm_80", "sm_90"], "trouble"),
        ((12, 0), ["sm_80", "sm_90", "compute_90"], "ok"),  # compiled when it is first used
    ],
)
def test_a_gpu_that_this_torch_has_no_code_for_is_trouble(monkeypatch, capability, archs, level):
    for name, value in {
        "is_available": True, "device_count": 1, "mem_get_info": (9 << 30, 9 << 30), "get_device_name": "card",
        "get_device_capability": capability, "get_arch_list": archs,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    (finding,) = doctor.devices()
    assert finding.level == level and ("has no code for its compute capability" in finding.text) is (level != "ok")


def test_the_image_the_makefile_and_the_lock_have_torch_builds_that_exist():
    root = Path(__file__).resolve().parents[2]
    image = (root / "infra/Dockerfile").read_text()
    first, *others = torch_builds.BUILDS
    assert f"ARG CUDA={first.base}\n" in image
    assert f'ARG TORCH_INDEX="{first.index}"\n' in image
    assert f'ARG TORCH="torch=={torch_builds.TORCH}"\n' in image
    for build in others:
        assert f"--build-arg CUDA={build.base} --build-arg TORCH_INDEX={build.index}\n" in image
    assert set(re.findall(r"whl/(cu\d+)", image)) == {build.index.rpartition("/")[2] for build in torch_builds.BUILDS}
    assert f"TORCH ?= torch=={torch_builds.TORCH}\n" in (root / "Makefile").read_text()
    for build in torch_builds.BUILDS:
        assert build.base.startswith(f"nvidia/cuda:{build.cuda}.")  # else DeepSpeed's nvcc is not torch's
