"""evaluate → register → promote → lineage → rollback through the `latentzoom` command."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from pipeline import storage
from pipeline.metrics import lpips_package
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.evaluation.report import load_report


@pytest.fixture
def work(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


SR = ["--task", "sr", "--scales", "2,4", "--sr-mode", "fixed-input", "--steps", "1", "--data", "photos"]


def test_the_whole_life_of_a_model(work, capsys, monkeypatch):
    monkeypatch.setattr(lpips_package, "PACKAGE", "no_such_package")  # as on a machine without real LPIPS
    make_bundle(work / "one", seed=1, task="sr")
    make_bundle(work / "two", seed=2, task="sr")
    assert main(["evaluate", "--model", "one", *SR, "--out", "e1", "--speed"]) == 0
    out = capsys.readouterr().out
    assert "lpips_random_vgg" in out and "stands in" in out
    assert {p.name for p in (work / "e1").iterdir()} >= {
        "report.json", "report.md", "report.html", "strip-x2.png", "plot-psnr_rgb.png"
    }  # fmt: skip
    report = load_report("e1/report.json")
    assert main(["evaluate", "--model", "one", *SR, "--out", "e1", "--speed"]) == 0  # the same: from its chunks
    capsys.readouterr()
    for model, more, why in (("two", [], "other model"), ("one", ["--seed", "5"], "other seed")):
        assert main(["evaluate", "--model", model, *SR, *more, "--out", "e1"]) == 2
        assert why in capsys.readouterr().err and load_report("e1/report.json").bundle_digest == report.bundle_digest
    assert report.get("psnr_rgb", "x4").num == 3
    assert report.get("fps", "x2").value > 0 and "sampling with" in report.get("peak_memory_mb", "x4").protocol

    assert main(["register", "one", "faces", "--report", "e1/report.json"]) == 0
    assert main(["promote", "faces"]) == 0
    assert main(["register", "two", "faces"]) == 0
    capsys.readouterr()
    status = main(["promote", "faces"])  # evaluates the candidate with the options of the champion's report
    out = capsys.readouterr().out
    assert "lpips_random_vgg at x4" in out and (status == 0) == out.strip().endswith("\npromoted")

    registry.promote("faces", candidate="2", champion_report=_report(0.9), candidate_report=_report(0.1))
    assert main(["lineage", "models:/faces@champion", "--json"]) == 0
    out = capsys.readouterr().out
    fields = json.loads(out[out.index("{") :])
    assert all(str(value).strip() for value in fields.values())
    assert fields["encoder sha256"] and fields["champion before"] == "version 1" and "candidate" in fields["aliases"]
    assert main(["rollback", "faces"]) == 0
    assert "models:/faces/1" in capsys.readouterr().out


def test_a_model_with_its_own_autoencoder_is_promoted_and_goes_on_after_a_kill(work, capsys, monkeypatch):
    """Champion and candidate have autoencoders of their own; each was measured on shards that it encoded itself."""
    from training.evaluation.chunk import ChunkWorker

    options = ["--task", "reconstruction", "--sizes", "32", "--split", "train", "--chunk-size", "1"]
    for seed, name in ((1, "one"), (2, "two")):
        make_bundle(work / name, seed=seed)
        config = PreprocessConfig(source_url="photos", dest=f"shards-{name}", size=32, batch_size=2, encode_threads=1)
        preprocess(config, autoencoder=str(work / name))
        assert main(["evaluate", "--model", name, "--data", config.dest, *options, "--out", f"e-{name}"]) == 0
        assert main(["register", name, "faces", "--report", f"e-{name}/report.json", "--data", config.dest]) == 0
        if name == "one":
            assert main(["promote", "faces"]) == 0
    capsys.readouterr()
    run, computed = ChunkWorker.run, []

    def killed(self, start, stop):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append((start, self.device))
        return run(self, start, stop)

    monkeypatch.setattr(ChunkWorker, "run", killed)
    assert main(["promote", "faces", "--workdir", "judged", "--device", "cpu"]) == 130
    monkeypatch.setattr(ChunkWorker, "run", lambda self, a, b: computed.append((a, self.device)) or run(self, a, b))
    assert main(["promote", "faces", "--workdir", "judged", "--device", "cpu"]) in (0, 1)
    out = capsys.readouterr().out
    assert "data set digest is" in out and "lpips" in out  # the champion was measured on the candidate's data
    assert computed == [(0, "cpu"), (1, "cpu"), (2, "cpu")]  # no chunk twice


def test_a_report_of_an_earlier_protocol_is_measured_anew(work, capsys):
    make_bundle(work / "one", task="sr")
    assert main(["evaluate", "--model", "one", *SR, "--out", "e"]) == 0
    report = json.loads((work / "e/report.json").read_text())
    for figure in report["figures"]:
        del figure["resamples"]
    (work / "old.json").write_text(json.dumps(report | {"protocol_version": 1}))
    for _ in range(2):
        assert main(["register", "one", "m", "--report", "old.json"]) == 0
        status = main(["promote", "m"])
    out = capsys.readouterr().out
    assert status == 1 and "a difference of 0 [0, 0], is undecided" in out and "evaluating the champion" in out


def _report(value):
    figure = {"name": "lpips", "method": "ours", "setting": "x2", "value": value, "low": value, "high": value,
              "protocol": "p", "num": 2, "resamples": [value, value + 1e-4]}  # fmt: skip
    guard = {**figure, "name": "psnr_rgb", "value": 20.0, "low": None, "high": None}
    return {"task": "sr", "data_digest": "d", "protocol_version": 1, "num": 2, "seed": 0, "sampler": "s",
            "figures": [figure, guard]}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "--model", "nowhere", *SR], "no bundle at"),
        (["evaluate", "--model", "models:/x@champion", *SR], "no alias 'champion' of model 'x'"),
        (["evaluate", "--model", "one", "--task", "sr", "--data", "photos"], "needs --scales"),
        (["evaluate", "--model", "one", "--task", "sr", "--data", "photos", "--scales", "2;3"], "list of numbers"),
        (["evaluate", "--model", "one", "--task", "sr", "--data", "nowhere", "--scales", "2"], "no data at"),
        (["evaluate", "--model", "one", *SR, "--inception", "none.pth", "--task", "generation"], "none.pth"),
        (["register", "nowhere", "m"], "no bundle at"),
        (["register", "one", "m", "--report", "empty.json"], "empty.json: this is not a report"),
        (["register", "one", "m", "--data", "shards"], "was encoded by autoencoder"),
        (["generate", "--model", "one", "--seed", "10000000000000000000000"], "is too large a number"),
        (["promote", "nobody"], "no alias 'candidate'"),
        (["rollback", "nobody"], "no alias 'champion'"),
        (["lineage", "models:/nobody@champion"], "no alias 'champion'"),
        (["lineage", "nobody"], "not a model URI"),
        (["register", "one", "m", "--tracking-uri", "./mlruns"], "no registry"),
    ],
)
def test_bad_input_is_one_line_and_status_2(work, capsys, arguments, words):
    make_bundle(work / "one", task="sr" if arguments[0] != "generate" else "generation")
    (work / "empty.json").write_text("{}")
    if words.startswith("no alias"):
        tracking.make_store(tracking.tracking_uri())
    if "shards" in arguments:
        other = make_bundle(work / "other", seed=5, task="sr")
        preprocess(PreprocessConfig(source_url="photos", dest="shards", size=32, batch_size=2), autoencoder=other)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("latentzoom: error: ") and words in error


@pytest.mark.parametrize("out", ["e", "memory://figures/e"])
def test_figures_and_pages_go_to_a_run_linked_to_the_data(work, out):
    make_bundle(work / "one", task="sr")
    uri = tracking.tracking_uri()
    run_id = tracking.start_run(uri, "judge")
    storage.write_bytes(storage.join(out, "strip-x9.png"), b"of a report before, or of somebody else")
    assert main(["evaluate", "--model", "one", *SR, "--out", out, "--run-id", run_id]) == 0
    run = tracking.get_run(uri, run_id)
    assert run.data.metrics["psnr_rgb/x2"] > 0 and "psnr_rgb/x2/bicubic" in run.data.metrics
    assert run.inputs.dataset_inputs[0].dataset.name == "photos"
    logged = [f.path for f in tracking.client(uri).list_artifacts(run_id, "evaluation")]
    assert {"evaluation/strip-x2.png", "evaluation/report.html", "evaluation/report.json"} <= set(logged)
    assert "evaluation/strip-x9.png" not in logged
