"""Jobs on a real Ray head with token authentication, through `latentzoom submit`, `jobs` and `stop`."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from PIL import Image
from ray._private.runtime_env.packaging import create_package
from ray_head import Head, ray_head, status
from small_pictures import make_pictures

from orchestration.cli import main
from orchestration.cluster import jobs
from orchestration.cluster.submitting import _commit, _environment, own_source, unkept_results
from orchestration.tracking import store as tracking
from pipeline.common_options import Common, in_force
from pipeline.errors import NobodyReads, UserError
from training.commit import commit_of

ROOT = Path(__file__).resolve().parents[2]


class Details:
    """What the job server says of a job, as far as exit statuses go."""

    def __init__(self, state: str, code: int | None):
        is_terminal = staticmethod(lambda: state != "RUNNING")
        self.status = type("Status", (), {"value": state, "is_terminal": is_terminal})
        self.driver_exit_code = code


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", -9, 137), ("STOPPED", None, 130)],
)
def test_exit_statuses_are_passed_on(state, code, expected):
    assert jobs.exit_status(Details(state, code)) == expected


def test_secrets_are_refused_before_anything_is_sent(capsys, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    with pytest.raises(UserError, match="sounds like a secret"):
        jobs.environment(["DB_PASSWORD"])
    assert jobs.environment(["LR=1"]) == {"LR": "1"}
    arguments = ["preprocess", "folder", "s3://key:hunter2@host/in", "s3://out", "--address", "http://127.0.0.1:1"]
    assert main(["submit", *arguments]) == 2
    error = capsys.readouterr().err
    assert "carries a secret" in error and "hunter2" not in error
    for words in (["--password", "hunter2"], ["https://host/x?sv=1&sig=hunter2"]):
        with pytest.raises(UserError, match="carries a secret") as caught:
            jobs.check_command(["preprocess", "folder", *words])
        assert "hunter2" not in str(caught.value)
    jobs.check_command(["train", "decoder", "--local", "--data", "s3://bucket/tokens"])


def test_mistakes_get_one_line(capsys):
    assert main(["submit", "--address", "http://127.0.0.1:1"]) == 2
    assert main(["submit", "demo", "--address", "http://127.0.0.1:1"]) == 2
    assert main(["submit", "train", "--address", "ray://127.0.0.1:1"]) == 2
    assert main(["jobs", "--address", "http://127.0.0.1:1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("latentzoom: error: ") for line in errors)
    assert "no Ray head answers at http://127.0.0.1:1" in errors[-1]


def test_only_the_source_folder_is_sent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert own_source() == ""
    environment = jobs.runtime_env(str(tmp_path), {"A": "b c"})
    monkeypatch.setattr(jobs, "token", lambda: "")
    command = ["latentzoom", "train", "align"]
    words = shlex.split(jobs.ray_command("http://h:8265", environment, command, name="mine", detach=True))
    assert words[:5] == ["ray", "job", "submit", "--address", "http://h:8265"]
    assert words[5:9] == ["--submission-id", "mine", "--working-dir", "."]
    assert words[-5:] == ["--no-wait", "--", "latentzoom", "train", "align"]
    sent = json.loads(words[words.index("--runtime-env-json") + 1])
    assert (
        sent["env_vars"] == {"A": "b c", "RAY_JOB_STOP_WAIT_TIME_S": "600"}
        and ".venv/" in sent["excludes"]
        and "pip" not in sent
    )


def test_of_a_checkout_only_the_packages_are_sent(tmp_path):
    """As Ray packs it: no data, runs or secrets that lie beside the source, and every package whole."""
    packages = ("pipeline", "preprocess", "training", "orchestration")
    source = tmp_path / "source"
    for package in packages:
        shutil.copytree(ROOT / package, source / package)
    for other in (".env", "infra/.env", "mlflow.db", "work/shard-000000.tar", "tests/test_a.py", ".venv/bin/python"):
        (source / other).parent.mkdir(parents=True, exist_ok=True)
        (source / other).write_text("x")
    excludes = jobs.runtime_env(str(source), {})["excludes"]
    create_package(str(source), tmp_path / "sent.zip", include_gitignore=True, excludes=excludes)
    sent = {name for name in zipfile.ZipFile(tmp_path / "sent.zip").namelist() if not name.endswith("/")}
    expected = {p.relative_to(source).as_posix() for name in packages for p in (source / name).rglob("*.py")}
    assert {name for name in sent if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in sent} == set(packages)


def test_another_folder_is_sent_without_its_secrets(tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("own/code.py", "own/.env", ".env"):
        (tmp_path / name).write_text("x")
    excludes = jobs.runtime_env(str(tmp_path), {})["excludes"]
    create_package(str(tmp_path), tmp_path.parent / "sent.zip", include_gitignore=True, excludes=excludes)
    assert zipfile.ZipFile(tmp_path.parent / "sent.zip").namelist() == ["own/code.py"]
    with pytest.raises(UserError, match="is not a folder of this machine"):
        jobs.runtime_env(str(tmp_path / "none"), {})


class Starting:
    """A head that takes jobs from the third time on, and says until then what Ray's says."""

    said = "Request failed with status code 500: No available agent to submit job, please try again later.."

    def __init__(self) -> None:
        self.asked = 0

    def submit_job(self, **job: str) -> str:
        self.asked += 1
        if self.asked < 3:
            raise RuntimeError(self.said)
        return job["submission_id"]


def test_a_head_that_has_only_just_started_is_asked_again():
    head = Starting()
    assert jobs.submit(head, "http://head:8265", patience_s=9.0, submission_id="first") == "first" and head.asked == 3
    with pytest.raises(UserError, match=r"^the cluster at http://head:8265: .*try again later"):
        jobs.submit(Starting(), "http://head:8265", patience_s=0.0, submission_id="first")
    refusing = Starting()
    refusing.said = "Request failed with status code 400: a job of this name is there"
    with pytest.raises(UserError, match="a job of this name is there"):
        jobs.submit(refusing, "http://head:8265", submission_id="first")
    assert refusing.asked == 1


def test_what_ray_refuses_to_send_is_one_line():
    with pytest.raises(UserError, match="nothing was sent: Package size"), jobs.user_errors("http://h:8265"):
        raise ValueError("Package size (900MiB) exceeds the maximum size of 500MiB.\nSee the docs")


@pytest.mark.parametrize(
    ("uri", "sent"),
    [
        ("http://mlflow:5000", {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}),
        ("http://127.0.0.1:5000", {}),
        ("http://joe:pw@mlflow:5000", {}),
        ("sqlite:///mlflow.db", {}),
    ],
)
def test_a_tracking_server_goes_along_where_the_cluster_can_mean_the_same(monkeypatch, capsys, uri, sent):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert _environment([]) == sent
    assert ("is not sent" in capsys.readouterr().err) == ("127.0.0.1" in uri)
    assert _environment(["MLFLOW_TRACKING_URI=http://other"]) == {"MLFLOW_TRACKING_URI": "http://other"}
    with in_force(Common(quiet=True)):
        assert _environment([]) == sent
    assert not capsys.readouterr().err


class Flaky:
    """A job server whose log breaks off, and which does not answer for a while, though the job goes on."""

    def __init__(self, silent: int) -> None:
        self.silent, self.tails = silent, 0

    async def tail_job_logs(self, job):
        self.tails += 1
        for number, text in enumerate(("one\n", "two\nth", "ree\n", "four\n")):
            if number == self.tails:
                raise aiohttp.ClientPayloadError("connection lost")
            yield text

    def get_job_info(self, job):
        if self.silent:
            self.silent -= 1
            raise ConnectionError("connection refused")
        return Details("RUNNING" if self.tails < 4 else "SUCCEEDED", None)


def test_a_log_that_breaks_off_goes_on_where_it_was_and_a_silent_head_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr("orchestration.tracking.outages.PAUSE_S", 0.0)
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    out, client = io.StringIO(), Flaky(silent=20)
    assert jobs.follow(client, "http://h:8265", "job", out).status.value == "SUCCEEDED"
    assert out.getvalue() == "one\ntwo\nthree\nfour\n" and client.tails == 4
    assert capsys.readouterr().err.count("no Ray head answers at http://h:8265") == 20
    with pytest.raises(UserError, match="no Ray head answers at .*asked 35 times"):
        jobs.follow(Flaky(silent=99), "http://h:8265", "job", out)


def test_a_log_that_nobody_reads_any_more_is_no_lost_connection(capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise NobodyReads

    with pytest.raises(NobodyReads):
        jobs.follow(Flaky(silent=0), "http://h:8265", "job", Closed())
    assert not capsys.readouterr().err


def test_the_commit_goes_along_with_the_source(tmp_path):
    """`.git` stays here, and the image is of another commit."""
    for path in ("orchestration/cli.py", "pipeline/x"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    assert _commit(str(tmp_path)) == {}  # not a checkout: nothing is known
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert _commit(str(tmp_path)) == {"LATENTZOOM_COMMIT": head}
    assert _commit("") == _commit(str(tmp_path / "orchestration")) == {}


@pytest.fixture(scope="module")
def head():
    with ray_head() as head:
        yield head


@pytest.fixture
def at(head: Head, monkeypatch) -> list[str]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return ["--address", head.address]


@pytest.mark.slow
def test_without_the_token_nothing_is_taken(head: Head, monkeypatch, capsys, tmp_path):
    request = json.dumps({"entrypoint": "touch /tmp/never"}).encode()
    assert status(f"{head.address}/api/jobs/", data=request) == 401
    assert status(f"{head.address}/api/jobs/") == 401
    assert status(f"{head.address}/api/jobs/", token="wrong") == 403
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["submit", "--version", "--address", head.address]) == 2
    assert "wants a token, and none was found" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert main(["submit", "--version", "--address", head.address]) == 2
    assert "refuses this token" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_job_makes_shards_and_its_exit_status_comes_back(head: Head, at, tmp_path, capfd):
    images, shards = tmp_path / "images", tmp_path / "shards"
    images.mkdir()
    for number in range(4):
        Image.fromarray(np.full((20, 20, 3), 40 * number, np.uint8)).save(images / f"{number}.png")
    assert main(["submit", "preprocess", "folder", str(images), str(shards), "--size", "16", *at]) == 0
    captured = capfd.readouterr()
    assert "4 of 16x16" in captured.out and "ray job submit --address" in captured.out
    assert "runtime_env" not in captured.err and "ray_pkg" not in captured.err  # Ray says a line for every .gitignore
    assert json.loads((shards / "manifest.json").read_text())["num_samples"] == 4
    assert main(["submit", "preprocess", "folder", str(tmp_path / "none"), str(shards), *at]) == 2
    captured = capfd.readouterr()
    assert "latentzoom: error" in captured.out and "exit status 2" in captured.err
    assert main(["jobs", *at]) == 0
    assert "SUCCEEDED" in (text := capfd.readouterr().out) and "FAILED" in text
    assert main(["submit", "--version", "--submission-id", "named", *at]) == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if "ray job submit" in line)
    assert str(Path.home()) not in line and head.token not in line
    again = line.replace("--submission-id named ", "--submission-id again ")
    shell = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")} | {"RAY_AUTH_TOKEN": head.token}
    result = subprocess.run(again, shell=True, env=shell, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "latentzoom 0." in result.stdout + result.stderr
    named, again = (jobs.connect(head.address).get_job_info(job) for job in ("named", "again"))
    assert (named.entrypoint, named.runtime_env) == (again.entrypoint, again.runtime_env)
    assert named.runtime_env["env_vars"]["LATENTZOOM_COMMIT"] == commit_of(Path.cwd())


@pytest.mark.slow
def test_a_detached_job_is_stopped_and_a_second_of_its_name_refused(head: Head, at, capfd):
    client = jobs.connect(head.address)
    client.submit_job(entrypoint="sleep 600", submission_id="long")
    assert main(["submit", "--version", "--submission-id", "long", *at]) == 2
    assert "long" in capfd.readouterr().err
    assert main(["stop", "long", *at]) == 0
    assert "long STOPPED" in capfd.readouterr().out
    assert main(["jobs", "long", "--follow", *at]) == jobs.STOPPED
    assert main(["submit", "--version", "--detach", "--submission-id", "short", *at]) == 0
    assert main(["jobs", "short", "--follow", *at]) == 0
    assert "latentzoom 0." in capfd.readouterr().out


@pytest.mark.slow
def test_a_stopped_training_job_leaves_a_checkpoint_and_continues(head: Head, at, tmp_path, capfd):
    """A real stage. Its next checkpoint of its own would come after hours."""
    pictures, shards, run = make_pictures(tmp_path / "pictures", 24), tmp_path / "shards", tmp_path / "run"
    assert main(["preprocess", "folder", str(pictures), str(shards), "--size", "32"]) == 0
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = ["train", "autoencoder", "--preset", "debug", "--data", str(shards), "--run-dir", str(run)]
    words += ["--workers", "1", "--tracking-uri", uri, "--set", "autoencoder.checkpoint_every=1000000"]
    endless = [*words, "--set", "autoencoder.steps=1000000"]
    assert main(["submit", *endless, "--detach", "--submission-id", "endless", *at]) == 0
    client = jobs.connect(head.address)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and not client.get_job_status("endless").is_terminal(), client.get_job_logs(
            "endless"
        )
        time.sleep(0.2)
    assert main(["stop", "endless", *at]) == 0
    captured = capfd.readouterr()
    assert "endless STOPPED" in captured.out and "writes a checkpoint first" in captured.err
    assert "stopped at step" in (log := client.get_job_logs("endless")) and "SIGKILL" not in log
    (manifest,) = run.glob("checkpoints/step-*/manifest.json")
    step = int(manifest.parent.name.removeprefix("step-"))
    assert step > 0
    run_id = tracking.find_run(uri, "autoencoder")
    assert run_id is not None and tracking.get_run(uri, run_id).info.status == "KILLED"
    last = [*words, "--set", f"autoencoder.steps={step + 2}"]
    assert main(["submit", *last, *at]) == 0
    assert json.loads((run / "result.json").read_text())["resumed_from"] == step
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == step + 2  # none twice
    assert tracking.get_run(uri, run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("evaluate --model m --data d", "--out evaluation"),
        ("evaluate --model m --out=e", "--out e"),
        ("promote faces", "--workdir promotion"),
        ("evaluate --model m --out s3://bucket/e", ""),
        ("promote faces --workdir /mnt/shared/p", ""),
        ("doctor --nodes", ""),
    ],
)
def test_results_that_would_go_with_the_head_are_named(words, place):
    notes = unkept_results(words.split())
    assert len(notes) == bool(place) and all(f"{place} is in the job's own folder" in note for note in notes)
