"""Tracking against a real SQLite store; delivery failures against an address where nobody listens."""

import json
import socket

import numpy as np
import pytest
from PIL import Image

from orchestration.cli import main
from orchestration.tracking import store as tracking
from orchestration.tracking.mlflow_reporter import MlflowReporter, replay
from pipeline.errors import UserError


def _closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def no_retries(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


def test_tracking_uri_is_absolute_and_refuses_the_file_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.tracking_uri("sqlite:///x/y.db") == f"sqlite:///{tmp_path}/x/y.db"
    assert tracking.tracking_uri("http://h:1") == "http://h:1"
    with pytest.raises(UserError, match="no registry"):
        tracking.tracking_uri("./mlruns")


def test_child_run_carries_metrics_params_images_and_dataset(tmp_path):
    uri = tracking.tracking_uri(None, tmp_path)
    parent = tracking.start_run(uri, "experiment")
    child = tracking.start_run(uri, "decoder", parent=parent, params={"opt": {"lr": 1e-3}})
    with MlflowReporter(child, uri, system_metrics=False) as reporter:
        for step in (0, 10):
            reporter.metrics(step, {"loss": 1.0 / (step + 1)})
            reporter.images(step, "reconstruction", np.full((6, 8, 3), step, np.uint8))
    tracking.log_dataset(uri, child, "/data/shards", "ab" * 32)
    tracking.end_run(uri, child)
    assert tracking.find_run(uri, "decoder", parent=parent) == child
    run = tracking.get_run(uri, child)
    assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.params == {"opt.lr": "0.001"}
    history = tracking.client(uri).get_metric_history(child, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (10, 1.0 / 11)]
    images = [f.path for f in tracking.client(uri).list_artifacts(child, "images")]
    assert sum(name.endswith(".png") and "step+10+" in name for name in images) == 1
    assert run.inputs.dataset_inputs[0].dataset.digest == ("ab" * 32)[:36]
    assert run.data.tags["data.training"] == "ab" * 32


@pytest.mark.slow
def test_unreachable_server_never_raises_and_everything_is_replayed(tmp_path, no_retries):
    uri = tracking.tracking_uri(None, tmp_path)
    run_id = tracking.start_run(uri, "stage")
    spill = tmp_path / "spill.jsonl"
    down = f"http://127.0.0.1:{_closed_port()}"
    reporter = MlflowReporter(run_id, down, spill=spill, system_metrics=False)
    reporter.params({"lr": 0.1})
    reporter.metrics(3, {"loss": 0.5})
    reporter.images(3, "grid", np.full((4, 4, 3), 77, np.uint8))
    reporter.close()
    reporter.metrics(4, {"loss": 0.25})  # after close: kept as well
    assert len(spill.read_text().splitlines()) == 4
    with open(spill, "a") as file:
        file.write('{"kind": "metr')  # a line cut short by a crash

    # The next process of the same run opens the same spill file, with a server that works.
    MlflowReporter(run_id, uri, spill=spill, system_metrics=False).close()
    run = tracking.get_run(uri, run_id)
    assert run.data.params == {"lr": "0.1"} and run.data.metrics == {"loss": 0.25}
    assert len(tracking.client(uri).list_artifacts(run_id, "images")) == 2
    assert not spill.exists() and not spill.with_suffix(".images").exists()


def test_replaying_twice_does_not_double_metrics(tmp_path):
    uri = tracking.tracking_uri(None, tmp_path)
    run_id = tracking.start_run(uri, "stage")
    line = json.dumps({"kind": "metrics", "step": 1, "values": {"a": 2.0}, "time_ms": 1000, "run_id": run_id})
    for _ in range(2):
        (tmp_path / "s.jsonl").write_text(line + "\n")
        assert replay(tmp_path / "s.jsonl", uri) == 1
    assert len(tracking.client(uri).get_metric_history(run_id, "a")) == 1


def test_unwritable_store_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        tracking.experiment_id(f"sqlite:///{tmp_path}/file/mlflow.db")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("a-folder", "no registry"),
        ("nosuch://joe:hunter2@host/x", "cannot use the tracking URI nosuch://host/x: "),
        ("mysql+nodriver://joe:hunter2@host/x", "cannot use the tracking URI mysql+nodriver://host/x: "),
        ("mysql+aiomysql://joe:hunter2@host/x", "No module named 'aiomysql'; use sqlite:///path/mlflow.db"),
        ("postgresql://joe:hunter2@host:port/x", "cannot use the tracking URI postgresql://host:port/x: "),
    ],
)
@pytest.mark.parametrize("verb", ["train", "pipeline", "evaluate", "generate"])
def test_a_store_that_cannot_be_is_one_line_in_every_verb(tmp_path, monkeypatch, capsys, verb, uri, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "0.png")
    arguments = {
        "train": ["denoiser", "--preset", "debug", "--local", "--data", "data", "--run-dir", "run"],
        "pipeline": [
            "--preset",
            "debug",
            "--source",
            "folder",
            "--source-url",
            "pictures",
            "--workdir",
            "work",
            "--local",
        ],
        "evaluate": ["--model", "models:/m@champion", "--task", "generation", "--data", "data", "--out", "out"],
        "generate": ["--model", "models:/m@champion"],
    }
    assert main([verb, *arguments[verb], "--tracking-uri", uri]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "hunter2" not in line


@pytest.mark.parametrize("name", ["joe's runs/it's", "plain", 'a "quoted" one', "100% _of_ it's"])
def test_a_run_is_found_again_whatever_its_folder_is_called(tmp_path, name):
    uri = tracking.tracking_uri(None, tmp_path)
    tags = {"latentzoom.run_dir": f"/data/{name}"}
    run_id = tracking.start_run(uri, name, tags=tags)
    other = name.replace("'", "x") if "'" in name else f"{name}x"
    tracking.start_run(uri, other, tags={"latentzoom.run_dir": f"/data/{other}"})
    assert tracking.find_run(uri, name, tag=("latentzoom.run_dir", f"/data/{name}")) == run_id
    assert tracking.find_run(uri, name, tag=("latentzoom.run_dir", f"/elsewhere/{name}")) is None


def test_a_data_set_that_another_run_makes_at_the_same_moment_is_linked(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    uri = tracking.tracking_uri(None, tmp_path)
    run = tracking.start_run(uri, "one")
    link, refused = MlflowClient.log_inputs, []

    def log_inputs(self, *arguments, **named):
        if not refused:
            refused.append(1)
            raise RuntimeError(
                "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name"
            )
        return link(self, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_inputs", log_inputs)
    tracking.log_dataset(uri, run, "/data/shards", "ab" * 32)
    assert [made.dataset.name for made in tracking.get_run(uri, run).inputs.dataset_inputs] == ["shards"]
