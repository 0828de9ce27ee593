"""`latentzoom runs`: what a folder and a store say of runs, and a run's curves as a picture."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image
from small_pictures import make_pictures

from orchestration import tracking
from orchestration.cli import main
from orchestration.runs.folder import folder_runs
from orchestration.runs.plot import plot
from orchestration.runs.state import curves_of, table
from pipeline import storage
from pipeline.errors import UserError
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess


def make_run(folder, lines, *, steps=100, result=None, age_s=0.0):
    """A run folder as training writes it, whose last report was so long ago."""
    settings = {"steps": steps, "global_batch": 8, "log_every": 10}
    storage.write_json(f"{folder}/run.json", {"stage": "align", "settings": settings})
    storage.write_bytes(f"{folder}/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    if result is not None:
        storage.write_json(f"{folder}/result.json", {"steps": result})
    if "://" not in str(folder):
        for name in ("run.json", "metrics.jsonl"):
            os.utime(folder / name, (time.time() - age_s,) * 2)


REPORTS = [
    {"step": 10, "loss": 2.0, "images_per_s": 2.0, "lr": 1e-3},
    {"step": 20, "loss": float("nan"), "images_per_s": 4.0, "lr": 1e-3},
    {"step": 20, "l1": 0.5, "val/psnr_x64": 21.5},
]


def test_a_folder_says_how_far_its_runs_are(tmp_path):
    make_run(tmp_path / "a", REPORTS)
    make_run(tmp_path / "job/align/0123", REPORTS, age_s=7300)
    make_run(tmp_path / "finished", REPORTS, steps=20, result=20)
    make_run(tmp_path / "raised", REPORTS, result=20)  # it was finished, and goes on to step 100
    make_run(tmp_path / "early", REPORTS, age_s=7300, result=20)  # it became no better
    storage.write_json(f"{tmp_path}/theirs/run.json", {"id": 7})  # another program's
    grids = tmp_path / "a/grids"
    for name in ("samples-00000010", "samples-00000020", "reconstruction-00000005"):
        storage.write_bytes(f"{grids}/{name}.png", b"")
    runs = {run.place: run for run in folder_runs(str(tmp_path))}
    assert {place: run.state for place, run in runs.items()} == {
        "a": "running", "job/align/0123": "silent", "finished": "done", "raised": "running", "early": "done",
    }  # fmt: skip
    run = runs["a"]
    assert (run.stage, run.step, run.steps, run.images_per_s) == ("align", 20, 100, 4.0)
    assert run.eta_s == 80 * 8 / 4.0 and runs["finished"].eta_s is None and runs["early"].eta_s is None
    assert run.figures == {"loss": 2.0, "images_per_s": 4.0, "lr": 1e-3, "l1": 0.5, "val/psnr_x64": 21.5}
    assert run.grid == "grids/samples-00000020.png" and runs["finished"].grid == ""
    lines = table(list(runs.values())).splitlines()
    assert lines[0].split()[:4] == ["run", "stage", "state", "step"] and "silent for 2h01m" in "\n".join(lines)
    assert "loss 2, val/psnr_x64 21.5, l1 0.5" in lines[1] and "lr" not in lines[1]


def test_a_slow_run_is_not_silent_between_its_reports(tmp_path):
    # a report every 10 · 8 / 0.5 = 160 s
    make_run(tmp_path / "slow", [{"step": 10, "loss": 1.0, "images_per_s": 0.5}], age_s=500)
    make_run(tmp_path / "fast", [{"step": 10, "loss": 1.0, "images_per_s": 500.0}], age_s=500)
    assert {run.place: run.state for run in folder_runs(str(tmp_path))} == {"slow": "running", "fast": "silent"}


def test_a_run_in_an_object_store_and_one_that_only_began(tmp_path):
    make_run("memory://runs-of-test/a", REPORTS)
    (run,) = folder_runs("memory://runs-of-test")
    assert run.place == "a" and run.state == "running"
    make_run(tmp_path / "b", [])
    (run,) = folder_runs(str(tmp_path / "b"))
    assert (run.place, run.state, run.step, run.eta_s, dict(run.figures)) == ("b", "running", 0, None, {})


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    make_run(tmp_path / "runs/a", REPORTS)
    make_run(tmp_path / "runs/b", [])
    for words, said in [
        (["nowhere"], "no such folder"),
        (["empty"], "no training runs in"),
        (["file"], "is a file"),
        (["runs", "--plot", "x.png"], "draws one run, and here are 2 (a, b)"),
        (["runs/a", "--plot", "x.jpg"], "drawn as PNG"),
        (["runs/b", "--plot", "x.png"], "no figures yet"),
        (["runs", "--tracking-uri", "sqlite:///x.db"], "give one of them"),
        ([], "mlflow.db"),
        (["0" * 32], "mlflow.db"),
    ]:
        assert main(["runs", *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1, (words, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "runs"]  # reading makes nothing


def test_the_picture_has_a_panel_for_each_figure(tmp_path):
    one = Image.open(_file(plot(curves_of(REPORTS[:1]), "a")))
    many = Image.open(_file(plot(curves_of(REPORTS + [{"step": 30, f"f{i}": 1.0} for i in range(6)]), "a")))
    assert one.format == "PNG" and many.height > 2 * one.height  # three panels a row
    with pytest.raises(UserError, match="no figures yet"):
        plot({}, "a")


def _file(data):
    import io

    return io.BytesIO(data)


def test_a_trained_stage_in_its_folder_and_in_its_store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_pictures(tmp_path / "photos", 8)
    preprocess(PreprocessConfig(source_url=str(tmp_path / "photos"), dest=str(tmp_path / "shards"), size=32))
    settings = [f"autoencoder.{name}" for name in ("steps=3", "log_every=1", "grid_every=1", "global_batch=4")]
    words = ["train", "autoencoder", "--preset", "debug", "--data", "shards", "--run-dir", "runs/ae", "--local"]
    assert main([*words, *(word for setting in settings for word in ("--set", setting))]) == 0
    capsys.readouterr()

    assert main(["runs", "runs", "--json"]) == 0
    (in_folder,) = json.loads(capsys.readouterr().out)
    assert main(["runs", "--json"]) == 0
    (in_store,) = json.loads(capsys.readouterr().out)
    for run in (in_folder, in_store):
        assert (run["stage"], run["state"], run["step"], run["steps"]) == ("autoencoder", "done", 3, 3)
    assert in_folder["place"] == "ae" and in_folder["figures"] == in_store["figures"]
    lines = [json.loads(line) for line in (tmp_path / "runs/ae/metrics.jsonl").read_text().splitlines()]
    assert in_store["figures"]["loss"] == lines[-1]["loss"]
    assert (tmp_path / "runs/ae" / in_folder["grid"]).is_file() and "00000003" in in_folder["grid"]
    assert Path(in_store["grid"]).is_file() and "step+3+" in in_store["grid"]

    run_id = tracking.find_run(tracking.tracking_uri(), "autoencoder")
    assert in_store["place"] == run_id
    for place in ("runs/ae", run_id):
        assert main(["runs", place, "--plot", "curves.png"]) == 0
        with Image.open("curves.png") as picture:
            assert picture.width > 1000
        Path("curves.png").unlink()
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert run_id in capsys.readouterr().out

    longer = [*words, *(word for setting in settings for word in ("--set", setting)), "--steps", "5"]
    assert main(longer) == 0  # a parameter of MLflow stays what it was
    capsys.readouterr()
    for place in ("runs/ae", run_id):
        assert main(["runs", place, "--json"]) == 0
        (run,) = json.loads(capsys.readouterr().out)
        assert (run["state"], run["step"], run["steps"]) == ("done", 5, 5)
