"""The chain of steps: what is done, stale or missing, and why; leases; asking for a step anew."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid

import fsspec
import pytest

from orchestration.chain import lease
from orchestration.chain.lease import sole_job
from orchestration.chain.redo import Redo
from orchestration.chain.steps import Step, run_steps, statuses
from orchestration.redact import plain_without_secrets, redact
from pipeline import storage
from pipeline.errors import UserError


class Work:
    """Two steps that note when they run."""

    def __init__(self, lr=0.1):
        self.ran, self.fail = [], []
        self.steps = [
            Step(name="a", settings={"stage": {"lr": lr}}, run=lambda done: self.run("a")),
            Step(name="b", settings={}, run=lambda done: self.run("b"), after=("a",)),
        ]

    def run(self, name):
        self.ran.append(name)
        if self.fail:
            raise self.fail.pop()
        return {"value": name}


def states(work, steps):
    return [(s.name, s.state, s.reason) for s in statuses(work, steps)]


def test_a_changed_setting_is_named_and_what_follows_is_stale(tmp_path):
    work = Work()
    assert [s[1] for s in states(str(tmp_path), work.steps)] == ["missing", "missing"]
    run_steps(str(tmp_path), work.steps)
    run_steps(str(tmp_path), work.steps)
    assert work.ran == ["a", "b"]
    changed = Work(lr=0.2)
    assert states(str(tmp_path), changed.steps) == [
        ("a", "stale", "stage.lr was 0.1, now 0.2"),
        ("b", "stale", "a changed"),
    ]


def test_a_result_that_was_deleted_is_missing(tmp_path):
    file = tmp_path / "result.bin"
    file.write_text("x")
    step = Step(name="a", settings=0, run=lambda done: {"outputs": [str(file)]})
    run_steps(str(tmp_path), [step])
    assert states(str(tmp_path), [step]) == [("a", "done", "")]
    file.unlink()
    assert states(str(tmp_path), [step]) == [("a", "missing", f"its result {file} is gone")]


def test_passing_failures_are_tried_again_and_user_errors_are_not(tmp_path, capsys):
    work = Work()
    work.fail = [OSError("cable pulled")]
    run_steps(str(tmp_path), work.steps, retries=1)
    assert work.ran == ["a", "a", "b"]
    assert "cable pulled" in capsys.readouterr().err
    work = Work(lr=0.3)
    work.fail = [UserError("mend it")]
    with pytest.raises(UserError, match="mend it"):
        run_steps(str(tmp_path), work.steps, retries=5)
    assert work.ran == ["a"]


def test_a_request_to_redo_counts_once_until_it_is_finished(tmp_path):
    work = str(tmp_path)
    asked = Redo.load(work).ask("evaluate")
    asked.save(work)
    assert Redo.load(work).ask("evaluate").counts == {"evaluate": 1}  # typed again after a kill: the same request
    Redo.load(work).close().save(work)
    assert Redo.load(work).ask("evaluate").counts == {"evaluate": 2}
    assert Redo.load(work).ask("").counts == {"evaluate": 1}


def test_a_local_folder_has_one_job_and_a_kill_frees_it(tmp_path):
    code = (
        "import sys; from orchestration.chain.lease import sole_job\n"
        "with sole_job(sys.argv[1]):\n    print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another job is running"):
        with sole_job(str(tmp_path)):
            pass
    other.kill()
    other.wait()
    with sole_job(str(tmp_path)):
        pass


@pytest.fixture
def remote():
    url = f"memory://lease-{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def test_an_object_store_has_one_job_and_a_dead_one_is_succeeded(remote, monkeypatch):
    with sole_job(remote):
        with pytest.raises(UserError, match="another job"):
            with sole_job(remote):
                pass
    with sole_job(remote) as check:  # released: free at once
        check()
        monkeypatch.setattr(time, "time", lambda now=time.time: now() + 10 * lease.LEASE_S)
        with sole_job(remote):  # the first has not renewed for long: it counts as dead
            pass
    names = [n for n in storage.list_files(remote) if "lease-" in n]
    assert len(names) <= 2  # old leases are swept


def test_of_two_jobs_that_start_at_once_one_gets_the_lease(remote):
    first, second = lease._Lease(remote), lease._Lease(remote)
    numbers = second._numbers
    calls = []

    def late():  # the second looks before the first has written, and writes after it
        calls.append(1)
        if len(calls) == 1:
            seen = numbers()
            first.acquire()
            return seen
        return numbers()

    second._numbers = late
    with pytest.raises(UserError, match="just now"):
        second.acquire()
    first.check()
    first.release()


def test_a_store_that_takes_no_writes_is_one_line(remote, monkeypatch):
    def refuse(self, path, value, mode="overwrite", **kwargs):
        raise FileNotFoundError("The specified bucket does not exist\nand more")

    fsspec.filesystem("memory").pipe_file(f"{remote.removeprefix('memory:/')}/other", b"x")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    with pytest.raises(UserError, match="cannot write to memory://.*bucket does not exist; check the address"):
        with sole_job(remote):
            pass


def test_a_holder_that_was_succeeded_stops(remote, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    old = lease._Lease(remote)
    old.acquire()
    fs, path = storage.filesystem(old._url(old.number + 1))
    fs.pipe_file(path, json.dumps({"owner": "new", "until": time.time() + 90}).encode())
    old._thread.join()
    with pytest.raises(UserError, match="lost the hold"):
        old.check()
    old.release()
    assert json.loads(fs.cat_file(path))["owner"] == "new"


def test_secrets_are_taken_out():
    assert (
        redact("pg://joe:pass@db/x --password hunter2 TOKEN=abc lr=1") == "pg://***@db/x --password *** TOKEN=*** lr=1"
    )
    assert redact("x --password 'hunter 2' --token abc, y") == "x --password *** --token ***, y"
    signed = "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=0a1b&X-Amz-Credential=AK%2F2&partNumber=3"
    clean = "https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=***&X-Amz-Credential=***&partNumber=3"
    assert redact(f"GET {signed} failed") == f"GET {clean} failed"
    assert plain_without_secrets([signed]) == [clean]
    for text in ("https://a.blob.core.windows.net/c?sv=2&sig=aB%2F9&se=1", "http://host/x?token=hunter2&y=1"):
        assert redact(text).count("***") == 1 and not {"aB%2F9", "hunter2"} & set(
            redact(text).replace("&", "=").split("=")
        )
        assert redact(text).endswith("=1")
    assert redact("s3://bucket/design?sigma=3&keyboard=de") == "s3://bucket/design?sigma=3&keyboard=de"
    assert plain_without_secrets({"url": ["s3://key:secret@host/b"]}) == {"url": ["s3://host/b"]}
    assert redact("latentzoom train --set align.lr=1e-6") == "latentzoom train --set align.lr=1e-6"
