"""The demo's edges: bad folders, one at a time, steps remembered. (The whole demo is run by CI itself.)"""

import fcntl
import shutil
from collections import namedtuple

import pytest
from tiny_bundle import make_bundle

from orchestration.chain.steps import statuses
from orchestration.cli import main
from orchestration.demo import contact_sheet
from orchestration.demo import photos as demo_photos
from orchestration.demo.chain import open_demo, steps
from orchestration.demo.contact_sheet import SCALES, SIZES, draw
from orchestration.verbs import demo as demo_cli
from pipeline.errors import UserError
from pipeline.model import LatentZoom


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*choose another folder"):
        open_demo(tmp_path / "file" / "demo", 10)


def test_too_few_minutes_and_too_little_disk(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="at least 5"):
        open_demo(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 5 << 20))
    with pytest.raises(UserError, match="has 5 MB free"):
        open_demo(tmp_path, 10)


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["demo", "--work", str(tmp_path)]) == 2
    assert "another demo is running" in capsys.readouterr().err


def test_photographs_are_laid_out_whole_and_split_by_photograph(tmp_path):
    num_train, num_held_out = demo_photos.lay_out(tmp_path)
    names = {split: {p.name for p in (tmp_path / split).iterdir()} for split in ("train", "val")}
    assert (len(names["train"]), len(names["val"])) == (num_train, num_held_out)
    assert not names["train"] & names["val"]
    (tmp_path / "train" / "astronaut.png").write_bytes(b"half")
    demo_photos.lay_out(tmp_path)
    assert (tmp_path / "train" / "astronaut.png").stat().st_size > 1000


def test_a_missing_photograph_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_photos, "TRAIN", ("skimage/data/nothing.png",))
    with pytest.raises(UserError, match=r"skimage/data/nothing\.png is not installed"):
        demo_photos.lay_out(tmp_path)


def test_other_minutes_make_the_training_stale_and_keep_the_shards(tmp_path):
    ten, sixty = open_demo(tmp_path, 10), open_demo(tmp_path, 60)
    keys = [{s.name: s.key for s in statuses(str(tmp_path), steps(demo))} for demo in (ten, sixty)]
    assert keys[0]["images"] == keys[1]["images"]
    for stage in ("autoencoder", "latents", "align", "use"):
        assert keys[0][stage] != keys[1][stage]


def test_the_contact_sheet_shows_every_size_and_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "_SIDE", 48)
    demo_photos.lay_out(tmp_path / "photos")
    model = LatentZoom.load(make_bundle(tmp_path / "bundle"))
    photo = tmp_path / "photos" / "val" / "chelsea.png"
    sheet = draw(model, [photo], "title", num=2)
    assert sheet.mode == "RGB"
    assert sheet.height > sum(size[0] for size in SIZES) + 48 * len(SCALES)
    assert any(size[0] != size[1] for size in SIZES)


def test_the_table_lists_every_stage_once():
    results = {
        "autoencoder": {"seconds": 3.0, "first_loss": 1.0, "last_loss": 0.5, "metric": "20 dB"},
        "use": {"seconds": 1.0, "metric": "sheet"},
    }
    lines = demo_cli._table(results).strip().splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("-")] == ["stage", "autoencoder", "use", "total"]
    assert "1.0000  0.5000" in lines[2]
