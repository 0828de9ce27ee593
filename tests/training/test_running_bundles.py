"""Bundles that are written while a run goes on: whole or absent whenever somebody looks, of the averaged weights."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_inputs import Shop

from pipeline import storage
from pipeline.bundle import UNFINISHED, Bundle, _load_bundle, load_bundle, save_bundle
from pipeline.errors import Stopped, UserError
from training.power_snapshots import _publish
from training.presets import debug
from training.run import TrainResult
from training.stopping import Stop

Run = Callable[..., TrainResult]


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_whoever_reads_during_a_swap_finds_one_bundle_or_none(shop: Shop, tmp_path: Path, kind: str) -> None:
    """A writer puts one bundle after another in place while a reader loads: what it gets is of one piece. The number in
    the meta is also the value of a weight."""
    url = str(tmp_path / "bundle") if kind == "local" else f"memory://{tmp_path.name}/bundle"
    parts = load_bundle(shop.bundle)
    assert parts.decoder is not None
    numbered = next(iter(parts.decoder.state_dict().values()))
    done, failures = threading.Event(), []

    def write() -> None:
        try:
            for number in itertools.count():
                if done.is_set():
                    return
                numbered.fill_(float(number))
                save_bundle(url, Bundle(parts.config, parts.autoencoder, parts.decoder, meta={"number": number}))
                done.wait(0.05)
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    try:
        while len(seen) < 12 and time.monotonic() < deadline:
            try:
                found = load_bundle(url)
            except UserError as error:
                assert "it has no config.json" in str(error)  # absent is allowed; damaged or half is not
                continue
            assert found.decoder is not None
            assert float(next(iter(found.decoder.state_dict().values())).flatten()[0]) == found.meta["number"]
            seen.add(found.meta["number"])
    finally:
        done.set()
        writer.join()
    assert failures == [] and len(seen) == 12
    if kind == "local":
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_writer_that_is_killed_at_any_file_leaves_one_bundle_or_none(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url = str(tmp_path / "bundle") if kind == "local" else f"memory://{tmp_path.name}/bundle"
    parts = load_bundle(shop.bundle)
    save_bundle(url, Bundle(parts.config, parts.autoencoder, parts.decoder, parts.denoiser, meta={"number": 1}))
    seen: list[object] = []
    publish = storage.publish_file

    def look(local_path: str | Path, target: str) -> None:
        publish(local_path, target)
        there = storage.exists(storage.join(url, "config.json"))
        seen.append(_load_bundle(url).meta["number"] if there else None)

    monkeypatch.setattr(storage, "publish_file", look)
    assert parts.denoiser is not None
    with torch.no_grad():
        next(parts.denoiser.parameters()).add_(1.0)
    save_bundle(url, Bundle(parts.config, parts.autoencoder, None, parts.denoiser, meta={"number": 2}))
    assert seen == [1] * 4 if kind == "local" else seen == [None, None, None, 2]
    assert load_bundle(url).meta["number"] == 2 and load_bundle(url).decoder is None


def test_a_swap_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, fresh = tmp_path / "bundle", tmp_path / "fresh"
    for folder, text in ((target, "old"), (fresh, "new")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    (target / "gone.txt").write_text("of the old one only")
    whole = Path.rename

    def fails_once(self: Path, other: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError("no")
        return whole(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails_once)
        with pytest.raises(OSError, match="no"):
            storage.replace_dir(fresh, str(target), last="config.json")
    assert (target / "config.json").read_text() == "old" and (target / "gone.txt").exists()
    storage.replace_dir(fresh, str(target), last="config.json")
    assert [path.name for path in target.iterdir()] == ["config.json"] and (target / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "fresh"]


def test_a_folder_with_other_things_in_it_is_not_replaced(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a note of somebody's")
    save_bundle(str(tmp_path), load_bundle(shop.bundle))
    assert (tmp_path / "mine.txt").exists() and load_bundle(str(tmp_path)).decoder is not None


def stopped_run(run_stage: Run, watched_shop: Shop, run_dir: Path, *settings: str) -> None:
    """A run whose first step is done, as it is at any moment of a longer one."""
    with pytest.raises(Stopped):
        run_stage(
            "denoiser", "denoiser.steps=8", "denoiser.bundle_every=1", "denoiser.validate_every=1", *settings,
            run_dir=run_dir, data=watched_shop.data, bundle=watched_shop.bundle, stop_requested=lambda: Stop.LEAVE,
        )  # fmt: skip


def test_newest_and_best_bundles_hold_the_averaged_weights(run_stage: Run, watched_shop: Shop, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    leftover = run_dir / ".bundle.1234.new"
    leftover.mkdir(parents=True)
    stopped_run(run_stage, watched_shop, run_dir)
    assert not leftover.exists()
    averages = load_file(run_dir / "checkpoints/step-00000001/ema-00000.safetensors")
    incoming = load_bundle(watched_shop.bundle)
    for name in ("bundle", "bundle-best"):
        found = load_bundle(str(run_dir / name))
        assert found.denoiser is not None and found.decoder is not None and incoming.decoder is not None
        for key, tensor in found.denoiser.state_dict().items():
            assert torch.equal(tensor, averages[f"0:{key}"])
        assert found.autoencoder.identity() == incoming.autoencoder.identity()
        assert "written while training went on, after step 1 of 8" in found.card
        assert found.meta[UNFINISHED] == {"step": 1, "of": 8} and found.meta["stages"]["denoiser"]["steps"] == 1
    assert load_bundle(str(run_dir / "bundle-best")).meta["best"]["figure"] == "val/loss"
    result = run_stage("denoiser", "denoiser.steps=8", "denoiser.bundle_every=1", "denoiser.validate_every=1",
                       run_dir=run_dir, data=watched_shop.data, bundle=watched_shop.bundle)  # fmt: skip
    last = load_bundle(result.bundle)
    assert UNFINISHED not in last.meta and last.meta["stages"]["denoiser"]["steps"] == 8
    assert sorted(path.name for path in run_dir.glob("*bundle*")) == ["bundle", "bundle-best"]


def test_a_bundle_that_cannot_be_written_ends_no_run(
    run_stage: Run, shop: Shop, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(url: str, bundle: Bundle) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("training.newest.save_bundle", full)
    result = run_stage("denoiser", "denoiser.bundle_every=1")
    assert result.steps == debug().denoiser.steps and load_bundle(result.bundle).denoiser is not None
    assert "could not be written, training goes on: No space left on device" in caplog.text


def test_what_a_checkpoint_knows_of_is_there_before_it(
    run_stage: Run, watched_shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed as soon as a checkpoint is complete does not make its bundles and snapshots again."""
    run_dir, found = tmp_path / "run", []

    def slowly(write: Callable[..., None]) -> Callable[..., None]:
        def late(*arguments: object) -> None:
            time.sleep(0.3)
            write(*arguments)

        return late

    def look(url: str, value: dict, write: Callable[..., None] = storage.write_json) -> None:
        if url.endswith("manifest.json"):
            best, step = value["state"]["watch"]["best"], value["step"]
            newest = load_bundle(str(run_dir / "bundle")).meta[UNFINISHED]["step"]
            snapshots = sorted(path.name for path in (run_dir / "averages").glob("step-*"))
            found.append((load_bundle(str(run_dir / "bundle-best")).meta["best"] == best, newest == step, snapshots))
        write(url, value)

    monkeypatch.setattr("training.newest.save_bundle", slowly(save_bundle))
    monkeypatch.setattr("training.power_snapshots._publish", slowly(_publish))
    monkeypatch.setattr(storage, "write_json", look)
    stopped_run(run_stage, watched_shop, run_dir, "denoiser.power_ema_every=1")
    assert found == [(True, True, ["step-00000001.safetensors"])]
