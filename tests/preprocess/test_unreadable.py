"""What cannot be read: a rejected picture where it is one picture's fault, one line where it is the whole source's."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import lmdb
import pytest

from pipeline.errors import UserError
from preprocess.check import CheckConfig, check
from preprocess.cli import main
from preprocess.config import PreprocessConfig
from preprocess.quarantine import quarantine_name
from preprocess.run import preprocess
from preprocess.shards.verify import verify
from preprocess.sources.folder import FolderSource
from tests.preprocess.conftest import make_pictures

ROOT = Path(__file__).resolve().parents[2]


def _zip(folder: Path, method: int) -> Path:
    """Four pictures in a zip, one of them damaged and one said to be encrypted."""
    make_pictures(folder / "pictures", 4)
    path = folder / "photos.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for picture in sorted((folder / "pictures").iterdir()):
            archive.write(picture, picture.name)
        infos = archive.infolist()
    data = bytearray(path.read_bytes())
    start = infos[1].header_offset + 30 + len(infos[1].filename) + infos[1].compress_size // 2
    for offset in range(64):
        data[start + offset] ^= 0x55
    directory = data.index(b"PK\x01\x02" + bytes(data[data.index(b"PK\x01\x02") + 4 : data.index(b"PK\x01\x02") + 6]))
    third = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02", directory + 4) + 4)
    data[third + 8] |= 1
    data[infos[2].header_offset + 6] |= 1
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
def test_bad_members_of_a_zip_are_rejected_pictures(tmp_path, method):
    config = PreprocessConfig(source_url=str(_zip(tmp_path, method)), dest=str(tmp_path / "out"), size=16)
    summary = preprocess(config.replace(policy="quarantine", max_rejects=3))
    assert (summary.num_samples, summary.rejected) == (2, {"damaged": 2})
    with pytest.raises(UserError, match="00[12].png cannot be used .damaged: zip member"):
        preprocess(config.replace(dest=str(tmp_path / "strict"), batch_size=1, decode_threads=1, seed=3))


def test_a_cut_database_is_one_line_and_never_a_signal(tmp_path):
    path = tmp_path / "tower_train_lmdb"
    path.mkdir()
    make_pictures(tmp_path / "pictures", 1, 200, 200)
    value = (tmp_path / "pictures" / "000.png").read_bytes()
    with lmdb.open(str(path), map_size=1 << 24) as environment:
        for number in range(6):
            with environment.begin(write=True) as transaction:
                transaction.put(hashlib.sha1(bytes([number])).hexdigest().encode(), value)
    whole = (path / "data.mdb").read_bytes()
    argv = ["lsun", str(path), str(tmp_path / "out"), "--size", "16"]
    code = (
        "import sys, json; from preprocess.sources.lsun import LsunSource; from pipeline.errors import UserError\n"
        "for cut in json.loads(sys.argv[2]):\n"
        "  open(sys.argv[1] + '/data.mdb', 'r+b').truncate(cut)\n"
        "  try: LsunSource({'train': sys.argv[1]}).list_images(); print('listed')\n"
        "  except UserError as error: print(error)\n"
    )
    cuts = [len(whole) - 1, len(whole) // 2, 3 * 4096, 8192, 5000, 100, 0]
    result = subprocess.run(
        [sys.executable, "-c", code, str(path), json.dumps(cuts)], capture_output=True, text=True, cwd=ROOT
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == len(cuts), result.stderr
    assert all("data.mdb" in line and "copy it again" in line for line in lines), lines
    (path / "data.mdb").write_bytes(whole)
    assert main(argv) == 0


def test_skip_then_quarantine_fills_the_quarantine(config, pictures):
    (pictures / "005.png").write_bytes(b"junk")
    preprocess(config.replace(policy="skip"))
    summary = preprocess(config.replace(policy="quarantine"))
    assert summary.num_shards_kept == 3
    kept = list(Path(config.dest, "quarantine").iterdir())
    assert [path.read_bytes() for path in kept] == [b"junk"] and kept[0].name.endswith("-005.png")
    kept[0].unlink()
    preprocess(config.replace(policy="quarantine"))
    assert len(list(Path(config.dest, "quarantine").iterdir())) == 1


def test_long_names_of_any_script_are_quarantined(config, pictures):
    name = "图" * 78 + ".png"
    (pictures / name).write_bytes(b"junk")
    assert preprocess(config.replace(policy="quarantine")).rejected == {"not_an_image": 1}
    (kept,) = Path(config.dest, "quarantine").iterdir()
    assert kept.name == quarantine_name(name) and len(kept.name.encode()) <= 97 and kept.name.endswith("图.png")


def test_no_sample_at_all_is_no_success(config, pictures, capsys):
    for path in pictures.iterdir():
        path.write_bytes(b"junk")
    argv = ["folder", str(pictures), config.dest, "--policy", "skip", "--max-reject-fraction", "1"]
    for _ in range(2):
        assert main(argv) == 2
        assert "no image of the split 'train' can be used: 11 of 11 images are rejected" in capsys.readouterr().err
    assert not Path(config.dest, "manifest.json").exists()
    assert len(Path(config.dest, "rejects.jsonl").read_text().splitlines()) == 11


def test_an_emptied_split_is_no_success(config, pictures):
    (pictures / "val").mkdir()
    (pictures / "val" / "a.png").write_bytes(b"junk")
    with pytest.raises(UserError, match="no image of the split 'val' can be used"):
        preprocess(config.replace(policy="skip", val_folder="val"))


def test_links_that_lead_to_themselves_are_one_line(tmp_path, capsys):
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "loop").symlink_to("loop")
    for places in ((tmp_path / "loop", tmp_path / "out"), (tmp_path / "pictures", tmp_path / "loop")):
        assert main(["folder", *map(str, places), "--size", "16"]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("latentzoom: error: ") and "loop" in error and "\n" not in error


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.EUCLEAN, errno.EBADMSG])
def test_what_the_system_says_of_one_file_is_a_rejected_picture(config, monkeypatch, number):
    read = FolderSource.read

    def broken(self, image):
        if image == "003.png":
            raise OSError(number, os.strerror(number))
        return read(self, image)

    monkeypatch.setattr(FolderSource, "read", broken)
    assert preprocess(config.replace(policy="skip", retries=1)).rejected == {"unreadable": 1}


def test_places_that_mean_several_tars_or_all_buckets_are_one_line(capsys):
    assert main(["webdataset", "a.tar::b.tar", "out"]) == 2
    assert "use braces (shards-{000000..000099}.tar) or a folder" in capsys.readouterr().err


@pytest.mark.parametrize("num", [12, pytest.param(70, marks=pytest.mark.slow)])
def test_check_lists_all_bad_pictures_at_once(tmp_path, capsys, num):
    make_pictures(tmp_path / "in", num)
    (tmp_path / "in" / "000.png").write_bytes(b"junk")
    (tmp_path / "in" / "007.png").write_bytes((tmp_path / "in" / "008.png").read_bytes()[:-200])
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert main(["check", str(tmp_path / "in"), "--processes", "2"]) == 1
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith("000.png: not_an_image: ") and text[1].startswith("007.png: damaged: ")
    assert text[2] == "left out: 1 .txt" and text[3].startswith(f"{num - 2} of {num} images can be used (train {num}")
    config = CheckConfig(source_url=str(tmp_path / "in"), crop="grid", crop_pixels=48)
    assert {found.reason for found in check(config).bad} == {"not_an_image", "damaged", "too_small"}
    for name in ("000.png", "007.png"):
        (tmp_path / "in" / name).unlink()
    assert main(["check", "folder", str(tmp_path / "in"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == num - 2
    assert not [path for path in tmp_path.iterdir() if path.name != "in"]


def test_sigterm_stops_with_the_documented_status_and_the_command_continues(tmp_path):
    make_pictures(tmp_path / "in", 30)
    code = (
        "import os, signal, sys; from preprocess import cli, run\n"
        "seen = []\n"
        "class Bar(run.Progress):\n"
        "  def update(self, *a):\n"
        "    seen.append(1); super().update(*a)\n"
        "    if len(seen) == 8: os.kill(os.getpid(), signal.SIGTERM)\n"
        "run.Progress = Bar\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    argv = ["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "16", "--batch-size", "2",
            "--samples-per-shard", "4"]  # fmt: skip
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 75 and result.stderr.splitlines()[-1].startswith("latentzoom: stopped; ")
    assert not list((tmp_path / "out").glob(".*")) and not (tmp_path / "out" / "manifest.json").exists()
    before = signal.getsignal(signal.SIGTERM)
    assert main(argv) == 0 and signal.getsignal(signal.SIGTERM) is before
    assert verify(str(tmp_path / "out")).num_samples == 30


def test_help_names_source_and_dest(capsys):
    with pytest.raises(SystemExit):
        main(["folder", "--help"])
    text = capsys.readouterr().out
    assert "SOURCE DEST" in text and "--members" in text
