"""`latentzoom train`: its MLflow run is begun, found again and closed; a store that is away stops nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_pictures import make_pictures

from orchestration.cli import main
from orchestration.registry import versions as registry
from orchestration.registry.lineage import lineage
from orchestration.tracking import store as tracking
from orchestration.tracking.stage_run import stage_run
from pipeline.bundle import load_bundle
from pipeline.errors import STOPPED, Stopped
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from preprocess.shards.manifest import load_manifest
from training.presets import get_preset


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_pictures(tmp_path / "photos", 8)
    preprocess(PreprocessConfig(source_url=str(tmp_path / "photos"), dest=str(tmp_path / "shards"), size=32))
    return str(tmp_path / "shards")


def train(shards, *more):
    settings = ["--set", "autoencoder.steps=2", "--set", "autoencoder.log_every=1", "--set", "autoencoder.grid_every=1"]
    words = ["train", "autoencoder", "--preset", "debug", "--data", shards, "--run-dir", "run", "--local", *settings]
    return main([*words, *more])


def test_a_stage_has_one_run_with_parameters_data_figures_and_pictures(shards, tmp_path):
    assert train(shards) == 0
    uri = tracking.tracking_uri()
    run_id = tracking.find_run(uri, "autoencoder", tag=("latentzoom.run_dir", str(tmp_path / "run")))
    run = tracking.get_run(uri, run_id)
    assert run.info.status == "FINISHED" and run.data.params["preset"] == "debug"
    assert run.data.params["steps"] == "2" and "Stage 0" in run.data.tags["mlflow.note.content"]
    # MLflow writes every parameter above each picture: only a few are parameters, all are in settings.json
    assert len(run.data.params) == 5
    settings = json.loads(
        Path(tracking.client(uri).download_artifacts(run_id, "settings.json", str(tmp_path))).read_text()
    )
    assert settings["model.autoencoder.kind"] == "kl" and settings["steps"] == "2"
    assert run.data.tags["data.training"] == load_manifest(shards).digest
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    history = tracking.client(uri).get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(line["step"], line["loss"]) for line in lines]
    assert tracking.client(uri).list_artifacts(run_id, "images")

    assert train(shards) == 0  # finished before: nothing is trained, and no other run is begun
    experiment = tracking.experiment_id(uri, tracking.EXPERIMENT)
    assert [r.info.run_id for r in tracking.client(uri).search_runs([experiment])] == [run_id]


def test_a_stage_starts_from_a_registered_model_and_lineage_says_so(shards, tmp_path, capsys):
    still = ["--set", "autoencoder.lr=1e-12"]
    assert train(shards, *still) == 0
    first = registry.register("run/bundle", "first")
    words = ["--run-dir", "tuned", "--init", "models:/first@candidate", *still]
    assert train(shards, *words) == 0
    made, before = load_bundle("tuned/bundle"), load_bundle("run/bundle")
    started = made.meta["stages"]["autoencoder"]["started_from"]["autoencoder"]
    assert started["of"] == first.uri == "models:/first/1"  # the alias is pinned
    for name, tensor in before.autoencoder.state_dict().items():
        assert torch.allclose(made.autoencoder.state_dict()[name], tensor, atol=1e-6)
    uri = tracking.tracking_uri()
    run_id = tracking.find_run(uri, "autoencoder", tag=("latentzoom.run_dir", str(tmp_path / "tuned")))
    settings = json.loads(
        Path(tracking.client(uri).download_artifacts(run_id, "settings.json", str(tmp_path))).read_text()
    )
    assert settings["started_from.autoencoder.sha256"] == started["sha256"] and settings["start"] == first.uri
    registry.register("tuned/bundle", "second")
    assert "started from the autoencoder of models:/first/1" in lineage("models:/second/1")["stages"]
    capsys.readouterr()
    assert train(shards, "--run-dir", "other", "--init", "models:/nobody@champion") == 2
    assert "'nobody'" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(Stopped("notice"), "KILLED"), (RuntimeError(), "FAILED")])
def test_a_stopped_stage_goes_on_in_its_own_run(shards, tmp_path, error, status):
    uri, preset = tracking.tracking_uri(), get_preset("debug")
    places = {"data": shards, "run_dir": "memory://user:word@bucket/run"}
    with pytest.raises(type(error)), stage_run(uri, "decoder", preset, **places) as first:
        raise error
    run = tracking.get_run(uri, first["run_id"])
    assert run.info.status == status and "word" not in json.dumps(run.data.tags)
    with stage_run(uri, "decoder", preset, **places) as second:
        assert second == first and tracking.get_run(uri, first["run_id"]).info.status == "RUNNING"


def test_a_store_that_is_away_is_a_warning_and_gets_everything_later(shards, tmp_path, capsys):
    assert train(shards, "--tracking-uri", "http://127.0.0.1:9") == 0
    error = capsys.readouterr().err
    assert (
        "warning: cannot reach the tracking server http://127.0.0.1:9" in error and "figures stay in run until" in error
    )

    assert train(shards) == 0  # the stage is finished; its run is made now
    uri = tracking.tracking_uri()
    run_id = tracking.find_run(uri, "autoencoder")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    history = tracking.client(uri).get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(line["step"], line["loss"]) for line in lines]
    images = [file.path for file in tracking.client(uri).list_artifacts(run_id, "images")]
    assert len([name for name in images if name.endswith(".png")]) == len(list((tmp_path / "run/grids").iterdir()))
    run = tracking.get_run(uri, run_id)
    assert run.info.status == "FINISHED" and run.data.params["steps"] == "2"


def test_without_tracking_no_store_is_made(shards, tmp_path):
    assert train(shards, "--no-tracking") == 0
    assert not (tmp_path / "mlflow.db").exists() and (tmp_path / "run/bundle/config.json").exists()


@pytest.mark.slow
def test_workers_stop_after_a_checkpoint_when_the_command_is_asked_to(shards, tmp_path):
    settings = ["--set", "autoencoder.steps=1000000", "--set", "autoencoder.checkpoint_every=1000000"]
    words = ["train", "autoencoder", "--preset", "debug", "--data", shards, "--run-dir", "run", "--workers", "2"]
    command = [sys.executable, "-m", "orchestration.cli", *words, *settings]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == STOPPED, error
    assert "stopped at step" in error and "Traceback" not in error
    (manifest,) = tmp_path.glob("run/checkpoints/step-*/manifest.json")
    assert json.loads(manifest.read_text())["world_size"] == 2
    uri = tracking.tracking_uri()
    assert tracking.get_run(uri, tracking.find_run(uri, "autoencoder")).info.status == "KILLED"
