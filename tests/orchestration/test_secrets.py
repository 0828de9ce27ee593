"""Marked secrets are sent through every verb, with a tracking server that answers and one that does not, and looked for
in all that comes out: what is printed and logged, what the server keeps, reports, bundles, runs, every other file."""

from __future__ import annotations

import http.server
import logging
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from servers import answers, free_port, mlflow, process, wait_until
from small_pictures import make_pictures
from tiny_bundle import make_bundle

from orchestration.cli import VERBS, main
from orchestration.cluster import jobs
from orchestration.cluster.relay import RelayStream
from orchestration.tracking import connection
from orchestration.tracking import store as tracking
from orchestration.tracking.mlflow_reporter import MlflowReporter
from pipeline import redact
from pipeline.errors import UserError

STORE, KEY, WORD, SIGNATURE = "hushStore81x", "hushKey72y", "hushWord63z", "hushSign54w"
MARKS = (STORE, KEY, WORD, SIGNATURE)


def test_a_secret_is_a_value_and_not_a_name(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://joe:{STORE}@host:5000")
    assert redact.clean(f"{KEY} was refused, {STORE} too") == "*** was refused, *** too"
    for words in (
        ["train", "align", "--set", "data.num_tokens=4"],
        ["--set", "data.token=4"],
        ["--data", "s3://b/tokens"],
    ):
        jobs.check_command(words)
    text = "the head wants a token, and none was found; put the head's token into RAY_AUTH_TOKEN"
    assert redact.redact(text) == redact.clean(text) == text
    for words in (["--data", f"s3://b/{KEY}"], ["--set", f"x.token={WORD}"], ["--token", WORD], [f"http://{WORD}@h/x"]):
        with pytest.raises(UserError, match="carries a secret") as caught:
            jobs.check_command(words)
        assert not [mark for mark in MARKS if mark in str(caught.value)]
    assert jobs.environment(["NUM_TOKENS=4", "PROXY=http://host"]) == {"NUM_TOKENS": "4", "PROXY": "http://host"}
    monkeypatch.setenv("PROXY", f"http://joe:{WORD}@h")
    for assignment in (f"X=http://joe:{WORD}@h", "PROXY", f"X={KEY}", "HF_TOKEN=abc", f"X=https://h/?sig={SIGNATURE}"):
        with pytest.raises(UserError, match="secret") as caught:
            jobs.environment([assignment])
        assert not [mark for mark in MARKS if mark in str(caught.value)]


def test_what_workers_and_loggers_say_is_clean(monkeypatch, capsys, tmp_path, caplog):
    sent = []
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_put", lambda key, text, namespace: sent.append(text))
    stream = RelayStream("channel", is_terminal=False)
    stream.write(f"reading https://joe:{WORD}@h/x\n")
    stream.flush()
    assert sent == [b"reading https://h/x\n"]
    handler = logging.StreamHandler(sys.stderr)
    log = logging.getLogger("somebody.else")
    log.addHandler(handler)
    with redact.cleaned_output([f"https://joe:{WORD}@h/x"]):
        print(f"and bare: {WORD}")
        log.warning("at %s", f"http://joe:{WORD}@h")
        try:
            raise OSError(f"{WORD} refused")
        except OSError:
            log.exception("failed")
    log.removeHandler(handler)
    monkeypatch.setattr(tracking, "client", lambda uri: (_ for _ in ()).throw(OSError(f"no http://joe:{WORD}@h")))
    uri = f"http://joe:{WORD}@127.0.0.1:1"
    with MlflowReporter("r", uri, spill=tmp_path / "spill.jsonl", system_metrics=False) as reporter:
        reporter.params({"data": f"http://joe:{WORD}@h"})
        reporter.metrics(1, {"loss": 0.5})
    output = "".join(capsys.readouterr()) + caplog.text + (tmp_path / "spill.jsonl").read_text()
    assert "and bare: ***" in output and "refused" in output and WORD not in output


@pytest.mark.parametrize("module", [["preprocess", "folder"], ["training.cli", "denoiser", "--preset", "debug"]])
def test_the_modules_that_are_run_without_the_command_let_none_out_either(tmp_path, module):
    """torchrun starts `training.cli` itself."""
    source = f"https://joe:{WORD}@127.0.0.1:1/{KEY}/{WORD}"
    rest = [source, "shards"] if module[0] == "preprocess" else ["--local", "--data", source, "--run-dir", "run"]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"AWS_SECRET_ACCESS_KEY": KEY, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", *module, *rest]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "***" in output
    assert_clean(module[0], output + "".join(str(path) for path in tmp_path.rglob("*")))


@pytest.fixture
def store(tmp_path, monkeypatch, cache):
    """MLflow behind an address with a password, and a web server of bundles and pictures that takes any."""
    for name in ("tmp", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    make_bundle(tmp_path / "web/bundle", task="sr")
    make_pictures(tmp_path / "web/photos", 6, side=32)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    port, log = free_port(), tmp_path / "mlflow.log"
    command = mlflow(
        "server", "--workers", "1", "--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/store.db",
        "--artifacts-destination", str(tmp_path / "artifacts"),
    )  # fmt: skip
    with process(command, log, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}, cwd=tmp_path) as server:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), server, log, "mlflow server")
        monkeypatch.chdir(tmp_path / "work")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://joe:{STORE}@127.0.0.1:{port}")
        yield f"http://joe:{WORD}@127.0.0.1:{web.server_port}"
    web.shutdown()


def calls(web: str, photos: str) -> dict[str, list[list[str]]]:
    """Every verb, with secrets wherever it takes an address."""
    signed, dead = f"{web}/bundle?sig={SIGNATURE}", f"http://joe:{WORD}@127.0.0.1:1"
    sr = ["--task", "sr", "--scales", "2", "--sr-mode", "fixed-input", "--steps", "1", "--num", "2", "--data", photos]
    bundle, local = f"{web}/bundle", ["--preset", "debug", "--local", "--threads", "1"]
    autoencoder = ["train", "autoencoder", *local, "--run-dir", "run"]
    chain = [
        "pipeline",
        "--preset",
        "debug",
        "--source",
        "folder",
        "--local",
        "--workdir",
        "chain",
        "--until",
        "pixels",
        "--preprocess",
        "val_fraction=0.3",
    ]
    return {
        "preprocess": [["preprocess", "folder", photos, "shards", "--size", "32", "--val-fraction", "0.3"],
                       ["preprocess", "folder", f"{dead}/x", "none"]],
        "train": [[*autoencoder, "--data", "shards", "--set", "autoencoder.steps=1"],
                  ["train", "decoder", *local, "--run-dir", "d", "--data", "shards", "--bundle", signed]],
        "runs": [["runs"], ["runs", "run"], ["runs", f"{dead}/runs"], ["runs", "--json", "--tracking-uri", dead]],
        "average": [["average", f"{dead}/run", "--length", "0.1", "--out", "short"],
                    ["average", "run", "--length", "0.1", "--out", f"{dead}/short"]],
        "serve": [["serve", "--port", "0", "--model", f"{dead}/bundle"], ["serve", "--address", dead]],
        "evaluate": [["evaluate", "--model", bundle, *sr, "--out", "e"],
                     ["evaluate", "--model", signed, *sr, "--out", "e2"],
                     ["evaluate", "--model", bundle, *sr, "--out", "e3", "--lpips", f"{dead}/alexnet.pth"]],
        "register": [["register", bundle, "faces", "--report", "e/report.json"]] * 2 + [["register", signed, "m"]],
        "promote": [["promote", "faces"], ["promote", "faces", "--candidate", "1", "--data", f"{dead}/photos"]],
        "lineage": [["lineage", "models:/faces@champion"], ["lineage", "models:/faces@champion", "--json"]],
        "rollback": [["rollback", "faces"], ["rollback", "nobody"]],
        "generate": [["generate", "--model", "models:/faces@champion", "--out", "m"], ["generate", "--model", signed]],
        "upscale": [["upscale", f"{web}/photos/000.png", "big.png", "--scale", "2", "--model", bundle],
                    ["upscale", f"{web}/none.png?sig={SIGNATURE}", "big2.png", "--scale", "2"]],
        "pipeline": [[*chain, "--source-url", photos], [*chain, "--source-url", f"{dead}/photos"],
                     [*chain, "--source-url", photos, "--autoencoder", signed]],
        "submit": [["submit", "train", "--data", f"{dead}/x"], ["submit", "--env", f"X={dead}", "plan"],
                   ["submit", "plan", "--address", dead]],
        "jobs": [["jobs", "--address", dead]],
        "stop": [["stop", "one", "--address", dead]],
        "doctor": [["doctor", "--storage", f"{dead}/bucket"]],
        "plan": [["plan", "--preset", f"{WORD}"]],
        "bench": [["bench", "--only", f"{dead}"]],
        "import": [["import", "ldm", f"{dead}/model.ckpt", "--model-config", f"{dead}/model.yaml",
                    "--out", "imported"]],
        "export": [["export", f"{dead}/bundle", "--to", "hub-folder", "--out", "hub"],
                   ["export", bundle, "--to", "hub-folder", "--out", f"{dead}/hub"]],
        "demo": [["demo", "--workdir", f"{dead}/demo"]],
    }  # fmt: skip


@pytest.mark.slow
def test_no_verb_lets_a_secret_out(store, tmp_path, capfd, caplog, monkeypatch):
    photos = str(tmp_path / "web/photos")
    verbs = calls(store, photos)
    assert verbs.keys() == VERBS.keys()
    statuses = {verb: [status(words) for words in lines] for verb, lines in verbs.items()}
    for verb in ("preprocess", "train", "evaluate", "register", "promote", "upscale", "pipeline"):
        assert statuses[verb][0] == 0, (verb, statuses, capfd.readouterr().err)  # the addresses were really used
    assert not list((tmp_path / "tmp").rglob("*.safetensors"))  # nor is a bundle that was fetched left there
    assert_clean("a server that answers", "".join(capfd.readouterr()) + caplog.text)
    connection._client.cache_clear()
    monkeypatch.setattr("orchestration.tracking.connection.time.sleep", lambda _: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://joe:{STORE}@127.0.0.1:1")
    for words in (words for lines in verbs.values() for words in lines[:1]):
        status(words)
    assert_clean("a server that is gone", "".join(capfd.readouterr()) + caplog.text)
    shutil.rmtree(tmp_path / "web")
    num = 0
    for path in tmp_path.rglob("*"):
        if path.is_file():
            num += 1
            assert_clean(str(path), path.read_bytes().decode("latin-1") + str(path))
    assert num > 60 and (tmp_path / "store.db").stat().st_size > 1e5


def status(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


def assert_clean(where: str, text: str) -> None:
    for mark in MARKS:
        at = text.find(mark)
        assert at < 0, f"{where}: ...{text[max(0, at - 300) : at + 60]}"
