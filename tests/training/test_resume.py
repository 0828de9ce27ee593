"""Runs that are killed, stopped, damaged or watched by nobody end as if nothing had happened (one process, float32)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stage_inputs import Shop

from pipeline import storage
from pipeline.errors import STOPPED, Unreachable, UserError
from training.checkpoint import CheckpointStore, step_name
from training.config import override
from training.presets import get_preset
from training.request import TrainRequest
from training.run import TrainResult, make_context
from training.world import World

Run = Callable[..., TrainResult]
ONE = World(0, 1, 0, torch.device("cpu"))


def command(shop: Shop, run_dir: Path, *settings: str) -> list[str]:
    words = [sys.executable, "-m", "training.cli", "denoiser", "--preset", "debug", "--local", "--threads", "1"]
    words += ["--device", "cpu", "--data", shop.data, "--bundle", shop.bundle, "--run-dir", str(run_dir)]
    return words + [word for setting in settings for word in ("--set", setting)]


def losses(run_dir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["loss"] for row in rows}


def weights(run_dir: Path) -> str:
    return storage.sha256_file(str(run_dir / "bundle/denoiser.safetensors"))


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(process: subprocess.Popen[str], path: Path, text: str) -> None:
    """Until the file holds the text. The process must not end before."""
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize("kill_at", [7, pytest.param(18, marks=pytest.mark.slow)])
def test_killed_run_ends_like_an_uninterrupted_one(run_stage: Run, shop: Shop, tmp_path: Path, kill_at: int) -> None:
    settings = ["denoiser.steps=24", "denoiser.checkpoint_every=5", "denoiser.schedule=cosine"]
    whole = run_stage("denoiser", *settings, run_dir=tmp_path / "whole")
    killed = start(command(shop, tmp_path / "killed", *settings))
    wait_for(killed, tmp_path / "killed/metrics.jsonl", f'"step": {kill_at},')
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = run_stage("denoiser", *settings, run_dir=tmp_path / "killed")
    assert 0 <= again.resumed_from < 24
    assert again.sample_order == whole.sample_order
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert again.first_loss == whole.first_loss and again.last_loss == whole.last_loss


@pytest.mark.slow
def test_termination_notice_leads_to_a_checkpoint(shop: Shop, tmp_path: Path) -> None:
    settings = ["denoiser.steps=2000", "denoiser.checkpoint_every=2000"]
    process = start(command(shop, tmp_path / "run", *settings))
    wait_for(process, tmp_path / "run/metrics.jsonl", '"step": 3,')
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == STOPPED, output
    (folder,) = (tmp_path / "run/checkpoints").glob("step-*")
    assert (folder / "manifest.json").exists() and "run again to continue" in output


def test_finished_run_is_not_repeated_and_can_be_prolonged(run_stage: Run, tmp_path: Path) -> None:
    first = run_stage("denoiser")
    assert run_stage("denoiser") == first
    longer = run_stage("denoiser", "denoiser.steps=6")
    assert longer.resumed_from == 4 and longer.steps == 6
    assert losses(tmp_path / "denoiser").keys() == {1, 2, 3, 4, 5, 6}


def test_other_settings_in_the_same_folder_are_refused(run_stage: Run) -> None:
    run_stage("denoiser")
    with pytest.raises(UserError, match="global_batch was 4, is 8"):
        run_stage("denoiser", "denoiser.global_batch=8")


def test_alignment_does_not_continue_with_another_decoder(run_stage: Run) -> None:
    run_stage("align")
    other = run_stage("decoder").bundle
    with pytest.raises(UserError, match="different bundle; choose another run folder"):
        run_stage("align", "align.steps=6", bundle=other)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no manifest", "one more"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    run_stage: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    settings = ["denoiser.checkpoint_every=2", "denoiser.steps=6"]
    whole = run_stage("denoiser", *settings)
    expected = weights(tmp_path / "denoiser")
    (tmp_path / "denoiser/result.json").unlink()
    folder = tmp_path / "denoiser/checkpoints" / step_name(6)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "gone":
        (folder / "state.pt").unlink()
    elif damage == "one more":  # DeepSpeed's converter would unpickle it
        (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"who wrote this?")
    else:
        data = bytearray((folder / "state.pt").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "state.pt").write_bytes(data if damage == "flip" else data[:-7])
    again = run_stage("denoiser", *settings)
    assert again.resumed_from == 4 and again.last_loss == whole.last_loss
    assert weights(tmp_path / "denoiser") == expected
    named = {"no manifest": "manifest.json", "one more": "zero_pp_rank_1_mp_rank_00_optim_states.pt"}
    assert named.get(damage, "state.pt") in caplog.text
    aside = list((tmp_path / "denoiser/checkpoints").glob("unverified-*"))
    if damage == "no manifest":  # it never was a checkpoint
        assert not aside
    else:
        assert f"kept as {aside[0].name}" in caplog.text
        kept = {path.name: path.read_bytes() for path in aside[0].iterdir()}
        assert len(before.items() - kept.items()) <= 1 and kept["manifest.json"] == before["manifest.json"]


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_checkpoint_that_was_read_wrongly_once_can_be_taken_back(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import training.checkpoint as module

    url = str(tmp_path / "checkpoints") if kind == "local" else f"memory://{tmp_path.name}/checkpoints"
    store = CheckpointStore(url, ONE, keep=5)
    for step in (1, 2, 3):
        store.save(step, "torch", lambda step=step: {"state.pt": {"step": torch.tensor(step)}}, {})  # type: ignore[misc]
    store.close()

    def unreadable(path: Path) -> str:
        if path.parent.name == step_name(3):
            raise OSError(5, "Input/output error")
        return "wrong" if path.parent.name == step_name(2) else read(path)

    read = module._sha256
    monkeypatch.setattr(module, "_sha256", unreadable)
    saved = CheckpointStore(url, ONE, keep=5).latest()
    assert saved is not None and saved.step == 1
    assert "cannot be read (Input/output error)" in caplog.text and "state.pt is damaged" in caplog.text
    monkeypatch.undo()
    folders = {name.split("/")[0] for name in storage.list_files(url)}
    aside = {name[11:24]: name for name in folders if name.startswith("unverified-")}
    assert aside.keys() == {step_name(2), step_name(3)} and len(folders) == 3
    storage.move_tree(f"{url}/{aside[step_name(3)]}", f"{url}/{step_name(3)}")
    saved = CheckpointStore(url, ONE, keep=5).latest()
    assert saved is not None and saved.step == 3
    assert torch.load(saved.folder / "state.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_flaky_file_system_costs_no_checkpoint(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A manifest that a listing leaves out, one that cannot be read, a store that does not answer; and where no
    checkpoint is sound, a run of days is not begun anew over them."""
    import training.checkpoint as module

    url = str(tmp_path / "checkpoints") if kind == "local" else f"memory://{tmp_path.name}/checkpoints"
    store = CheckpointStore(url, ONE, keep=5)
    for step in (1, 2):
        store.save(step, "torch", lambda: {"state.pt": {}}, {"mark": step})
    store.close()

    def stale(url: str) -> list[str]:
        return [name for name in listed(url) if name != f"{step_name(2)}/manifest.json"]

    listed, read = storage.list_files, storage.read_json
    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_files", stale)
        saved = CheckpointStore(url, ONE, keep=5).latest()
    assert saved is not None and saved.step == 2 and module.newest_state(url) == {"mark": 2}

    def raising(error: Exception, step: int) -> None:
        def broken(url: str) -> object:
            if step_name(step) in url:
                raise error
            return read(url)

        monkeypatch.setattr(storage, "read_json", broken)

    raising(Unreachable(f"{url} does not answer"), 2)  # it says nothing of the checkpoint
    for look in (CheckpointStore(url, ONE, keep=5).latest, lambda: module.newest_state(url)):
        with pytest.raises(Unreachable):
            look()
    raising(OSError(5, "Input/output error"), 2)
    assert module.newest_state(url) == {"mark": 1}
    saved = CheckpointStore(url, ONE, keep=5).latest()
    assert saved is not None and saved.step == 1
    assert f"{step_name(2)} is skipped: manifest.json cannot be read (Input/output error)" in caplog.text
    raising(OSError(5, "Input/output error"), 1)
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"no checkpoint under .* can be verified \(unverified-{step_name(2)}-.* anew"
        ):
            CheckpointStore(url, ONE, keep=5).latest()
    assert len(storage.list_folder(url)) == 2


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_store_prunes_and_finds_the_newest(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "checkpoints") if kind == "local" else f"memory://{tmp_path.name}/checkpoints"
    store = CheckpointStore(url, ONE, keep=2)
    for step in (1, 2, 3, 10):
        files = {"state.pt": {"step": torch.tensor(step)}}
        store.save(step, "torch", lambda files=files: files, {"mark": step})  # type: ignore[misc]
    store.wait()
    folders = {name.split("/")[0] for name in storage.list_files(url)}
    assert folders == {step_name(3), step_name(10)}
    saved = CheckpointStore(url, ONE, keep=2).latest()
    assert saved is not None and saved.step == 10 and saved.state == {"mark": 10}
    assert torch.load(saved.folder / "state.pt", weights_only=True)["step"] == 10
    store.close()


def test_every_machine_checks_what_it_fetched(tmp_path: Path) -> None:
    class SecondMachine(World):
        """Its first worker; worker 0 has found the checkpoint sound."""

        def broadcast(self, value: object) -> object:
            return manifest

        def gather(self, value: object) -> list[object]:
            return ["", value]

    url = f"memory://{tmp_path.name}/checkpoints"
    store = CheckpointStore(url, ONE, keep=2)
    store.save(1, "torch", lambda: {"state.pt": {"step": torch.tensor(1)}}, {})
    store.close()
    manifest = storage.read_json(f"{url}/{step_name(1)}/manifest.json")
    second = SecondMachine(1, 2, 0, torch.device("cpu"))
    assert CheckpointStore(url, second, keep=2).latest() is not None
    storage.write_bytes(f"{url}/{step_name(1)}/state.pt", b"not what was written")
    with pytest.raises(UserError, match=r"not the same on every machine: state\.pt is damaged"):
        CheckpointStore(url, second, keep=2).latest()


def test_write_error_is_told_at_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    store = CheckpointStore(str(tmp_path / "checkpoints"), ONE, keep=2)
    store.save(1, "torch", lambda: {"state.pt": {}}, {})
    with pytest.raises(UserError, match="could not be written"):
        store.wait()


def test_a_checkpoint_from_before_a_setting_existed_is_taken_at_its_default(shop: Shop, tmp_path: Path) -> None:
    def fingerprints(*settings: str) -> tuple[dict, dict]:
        preset = override(get_preset("debug"), list(settings))
        places = {"data": shop.data, "bundle": shop.bundle, "run_dir": str(tmp_path)}
        identity = make_context(TrainRequest(stage="denoiser", preset=preset, **places), ONE).identity
        older = json.loads(json.dumps(identity.fingerprint()))
        del older["settings"]["sample_latents"], older["model"]["decoder"]["norm"]
        return identity.completed(older, str(tmp_path)), identity.fingerprint()

    completed, now = fingerprints()
    assert completed == now
    completed, now = fingerprints("denoiser.sample_latents=true")
    assert completed != now
