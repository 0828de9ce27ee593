"""The chain of steps: what is done, stale or missing, and why; leases; asking for a step anew."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import pytest

from orchestration import tracking
from orchestration.chain import lease
from orchestration.chain.lease import sole_job
from orchestration.chain.redo import Redo
from orchestration.chain.steps import Step, run_steps, statuses
from orchestration.outages import is_outage, patiently
from pipeline import storage
from pipeline.errors import UserError, unreachable
from pipeline.redact import plain_without_secrets, redact


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


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr("orchestration.outages.PAUSE_S", 0.0)


def silence(where="s3://bucket/x", text="connection refused"):
    cause = ConnectionError(text)
    error = unreachable(where, cause)
    error.__cause__ = cause
    return error


def test_an_outage_is_waited_for_whatever_the_number_of_retries(tmp_path, capsys, no_pauses):
    work = Work()
    work.fail = [silence(), tracking.StoreSilent("cannot reach the tracking server http://h"), silence()]
    assert set(run_steps(str(tmp_path), work.steps, retries=0)) == {"a", "b"}
    assert work.ran == ["a"] * 4 + ["b"]
    assert capsys.readouterr().err.count("trying again in 0 s") == 3
    for lasting in (tracking.StoreError("no such data base"), silence(text="403 Forbidden")):
        work = Work(lr=len(str(lasting)))
        work.fail = [lasting]
        with pytest.raises(UserError):
            run_steps(str(tmp_path), work.steps)
        assert work.ran == ["a"]


def test_an_outage_that_does_not_end_is_one_line(no_pauses):
    asked = []

    def ask():
        asked.append(1)
        raise silence("s3://joe:hunter2@bucket/x")

    with pytest.raises(UserError, match=r"cannot reach s3://bucket/x: .*\(asked 35 times\)") as caught:
        patiently(lambda: patiently(ask, "inner"), "outer")
    assert len(asked) == 35 and not is_outage(caught.value)


def test_a_result_is_written_when_the_store_answers_again(tmp_path, monkeypatch, no_pauses):
    write, failures = storage.write_json, [silence(), silence()]

    def flaky(url, value):
        if failures and url.endswith("a.json"):
            raise failures.pop()
        write(url, value)

    monkeypatch.setattr(storage, "write_json", flaky)
    work = Work()
    run_steps(str(tmp_path), work.steps)
    assert work.ran == ["a", "b"] and [s[1] for s in states(str(tmp_path), work.steps)] == ["done", "done"]


def test_what_an_interrupted_attempt_took_is_read_when_the_store_answers_again(tmp_path, monkeypatch, no_pauses):
    exists, failures = storage.exists, [silence()]

    def flaky(url):
        if failures and url.endswith("b.attempt.json"):
            raise failures.pop()
        return exists(url)

    monkeypatch.setattr(storage, "exists", flaky)
    work = Work()
    run_steps(str(tmp_path), work.steps)
    assert work.ran == ["a", "b"] and not failures


class Blip(Exception):
    """As botocore's errors, which are no OSError."""


def test_a_lease_outlives_an_outage_and_knows_when_it_was_succeeded(remote, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    held = lease._Lease(remote)
    held.acquire()
    numbers = held._numbers
    asked = threading.Semaphore(0)

    def silent():
        asked.release()
        raise Blip("could not connect to the endpoint")

    held._numbers = silent
    for _ in range(3):  # it goes on asking
        assert asked.acquire(timeout=30)
    held._renewed -= 10 * lease.LEASE_S
    held.check()  # nobody else can have it either
    held._numbers = numbers
    held.check()  # looks itself, and renews
    assert time.monotonic() - held._renewed < lease.LEASE_S and held._thread.is_alive()
    held._numbers = silent
    held._renewed -= 10 * lease.LEASE_S
    fs, path = storage.filesystem(held._url(held.number + 1))
    fs.pipe_file(path, json.dumps({"owner": "new", "until": time.time() + 90}).encode())
    held._numbers = numbers
    with pytest.raises(UserError, match="lost the hold"):
        held.check()
    held.release()


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


def test_a_lease_whose_answer_was_lost_is_ours(remote, monkeypatch):
    """The store's client asked again, and the store found what it had written before."""
    memory = type(fsspec.filesystem("memory"))
    pipe = memory.pipe_file

    def twice(self, path, value, mode="overwrite", **kwargs):
        pipe(self, path, value, mode=mode, **kwargs)
        if mode == "create":
            raise FileExistsError(path)

    monkeypatch.setattr(memory, "pipe_file", twice)
    with sole_job(remote) as check:
        check()


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
