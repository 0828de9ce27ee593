"""Counts close from the folder: every file is an image or is said to be left out, by kind and number."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from pipeline.errors import UserError
from preprocess.cli import main
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from preprocess.shards.manifest import load_manifest
from preprocess.sources import open_source
from preprocess.sources.listing import said

ROOT = Path(__file__).resolve().parents[2]


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 18), (10, 200, 30)).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "a.png": "", "b.JFIF": "", "c.jpe": "", "d.pgm": "", "deep/er/e.webp": "", "f.avif": "", "me.edit.jpg": "",
    "me.jpg": "", "x.HEIC": ".heic", "y.heic": ".heic", "z.jp2": ".jp2", "t.tga": ".tga", "README": "without suffix",
    "labels.json": ".json", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": "NAS thumbnails", ".@__thumb/b.jpg": "NAS thumbnails",
    "#recycle/old.jpg": "in a recycle bin", "__MACOSX/._a.png": "macOS extras", "._a.png": "macOS extras",
    ".git/x.png": "hidden", "deep/.y.png": "hidden", "frame.0001": "other files",
    "00000.jpg": "", "00000.mask.png": ".mask.png beside an image", "only.mask.png": "",
    "shards/plan.json": "of shard sets", "shards/sources.txt.gz": "of shard sets",
    "shards/quarantine/bad.png": "of shard sets",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png())
    return tmp_path / "in"


def _check(source_url: str, skip: tuple[str, ...] = ()) -> None:
    source = open_source(PreprocessConfig(source_url=source_url, dest="x"))
    listed = {image for image, _ in source.list_images()}
    names = {name: kind for name, kind in FILES.items() if not name.startswith(skip or ("//",))}
    assert listed == {name for name, kind in names.items() if not kind}
    expected: dict[str, int] = {}
    for kind in filter(None, names.values()):
        expected[kind] = expected.get(kind, 0) + 1
    assert source.left_out() == expected and len(listed) + sum(expected.values()) == len(names)


def test_every_file_of_a_folder_is_an_image_or_is_counted(folder):
    _check(str(folder))


def test_rare_formats_are_read_where_they_are_asked_for(folder):
    for form, name in (("JPEG2000", "z.jp2"), ("TGA", "t.tga")):
        Image.new("RGB", (20, 18), (10, 200, 30)).save(folder / name, form)
    with zipfile.ZipFile(folder.parent / "rare.zip", "w") as archive:
        for name in ("z.jp2", "t.tga", "a.png"):
            archive.write(folder / name, name)
    for url in (str(folder), str(folder.parent / "rare.zip")):
        source = open_source(PreprocessConfig(source_url=url, dest="x", members=("jp2", "TGA")))
        assert sorted(image for image, _ in source.list_images()) == ["t.tga", "z.jp2"]
        config = PreprocessConfig(source_url=url, dest=str(folder.parent / "out"), size=8, members=("jp2", "tga"))
        assert preprocess(config.replace(dest=f"{config.dest}-{url[-4:]}")).num_samples == 2


def test_the_same_rules_hold_for_zips_and_stores(folder):
    memory = fsspec.filesystem("memory")
    with zipfile.ZipFile(folder.parent / "in.zip", "w") as archive:
        for name in FILES:
            archive.writestr(name, _png())
            memory.pipe_file(f"/listing/{name}", _png())
    _check("memory://listing")
    memory.rm("/listing", recursive=True)
    source = open_source(PreprocessConfig(source_url=str(folder.parent / "in.zip"), dest="x"))
    assert len(source.list_images()) + sum(source.left_out().values()) == len(FILES)


def test_what_is_left_out_is_said_in_terminal_summary_and_manifest(folder, tmp_path, capsys):
    argv = ["folder", str(folder), str(tmp_path / "out"), "--size", "16"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "left out: 3 of shard sets, 2 .heic, 2 NAS thumbnails, 2 hidden, 2 macOS extras" in text
    manifest = load_manifest(str(tmp_path / "out"))
    assert manifest.num_images + sum(manifest.left_out.values()) == len(FILES)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    (folder / "more.txt").write_text("beside")
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"][".txt"] == 1
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before  # what training knows the set by stays


def test_linked_folders_are_followed_once_and_never_round(folder, tmp_path):
    (tmp_path / "elsewhere" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere" / "sub" / "linked.png").write_bytes(_png())
    (folder / "album").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "deep" / "self").symlink_to("self")
    (folder / "deep" / "self.png").symlink_to("self.png")
    os.mkfifo(folder / "pipe.png")
    source = open_source(PreprocessConfig(source_url=str(folder), dest="x"))
    found = {image for image, _ in source.list_images()} - set(FILES)
    assert found == {"again/sub/linked.png", "deep/self.png"}
    left_out = source.left_out()
    assert left_out["linked folders"] == 2 and left_out["special files"] == 1
    summary = preprocess(
        PreprocessConfig(source_url=str(folder), dest=str(tmp_path / "out"), size=16, policy="quarantine")
    )
    assert summary.rejected == {"unreadable": 1}


def _bound_by_permissions(*argv: str) -> subprocess.CompletedProcess[str]:
    """The command run by somebody whom permissions bind; the superuser gives up passing by them."""
    command = [sys.executable, "-m", "preprocess", *argv]
    if os.getuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("the superuser reads everything")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_unreadable_folders_are_errors_and_unreadable_files_rejected_pictures(tmp_path):
    (tmp_path / "in" / "locked").mkdir(parents=True)
    for path in ("in/a.png", "in/b.png", "in/c.png", "in/locked/d.png"):
        (tmp_path / path).write_bytes(_png())
    (tmp_path / "in" / "b.png").chmod(0)
    (tmp_path / "in" / "locked").chmod(0)
    argv = ["folder", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "16", "--policy", "quarantine"]
    result = _bound_by_permissions(*argv)
    (tmp_path / "in" / "locked").chmod(0o755)
    assert result.returncode == 2 and result.stderr.startswith("latentzoom: error: cannot read ")
    assert "in/locked (Permission denied)" in result.stderr and result.stderr.count("\n") == 1
    result = _bound_by_permissions(*argv)
    assert result.returncode == 0, result.stderr
    assert "rejected: 1 unreadable" in result.stdout and "3 of 16x16 from 4 images" in result.stdout


def _tar(path: Path, names: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(_png())
            tar.addfile(info, io.BytesIO(_png()))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, names[0]
        tar.addfile(link)


def _tars(url: object, **changes: object) -> tuple[list[str], dict[str, int]]:
    source = open_source(PreprocessConfig(source="webdataset", source_url=str(url), dest="x", **changes))
    return sorted(image for image, _ in source.list_images()), source.left_out()


def test_tars_count_masks_links_and_other_members(tmp_path):
    names = [
        "00000.png",
        "00000.mask.png",
        "00000.json",
        "img.001.png",
        "img.002.png",
        "./x/1.input.png",
        ".hidden.png",
    ]
    _tar(tmp_path / "in" / "a.tar", names)
    (tmp_path / "in" / "index.txt").write_text("x")
    listed, left_out = _tars(tmp_path / "in")
    assert listed == ["a.tar/00000.png", "a.tar/img.001.png", "a.tar/img.002.png", "a.tar/x/1.input.png"]
    counted = {".mask.png beside an image": 1, ".json": 1, "hidden": 1, "links and special files in tars": 1, ".txt": 1}
    assert left_out == counted
    assert _tars(tmp_path / "in", members=("mask.png",))[0] == ["a.tar/00000.mask.png"]
    listed, left_out = _tars(tmp_path / "in", members=(".input.png",))
    assert listed == ["a.tar/x/1.input.png"] and left_out["not in --members"] == 4


def test_a_tar_cut_between_members_or_joined_to_another_is_refused(tmp_path):
    path = tmp_path / "in" / "a.tar"
    _tar(path, ["1.png", "2.png", "3.png"])
    whole = path.read_bytes()
    block = 512 + len(_png()) + -len(_png()) % 512
    for end in (block, 2 * block, 3 * block + 512):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="a.tar has no end marker: the file was cut"):
            _tars(tmp_path / "in")
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="holds more after its last readable member"):
        _tars(tmp_path / "in")
    damaged = bytearray(whole)
    damaged[block : block + 100] = b"x" * 100
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="holds more after its last readable member"):
        _tars(tmp_path / "in")


def test_braces_name_a_range_of_tars_and_pipes_are_never_run(tmp_path):
    for number in range(3):
        _tar(tmp_path / "in" / f"s-{number:03d}.tar", [f"{number}.png"])
    assert _tars(f"{tmp_path}/in/s-{{000..001}}.tar")[0] == ["s-000.tar/0.png", "s-001.tar/1.png"]
    url = f"{tmp_path}/in/s-{{001,002}}.tar"
    config = PreprocessConfig(source="webdataset", source_url=url, dest=f"{tmp_path}/out", size=8)
    assert preprocess(config).num_samples == 2
    with pytest.raises(UserError, match=r"no such tar file: .*s-003.tar and 1 more"):
        _tars(f"{tmp_path}/in/s-{{002..004}}.tar")
    with pytest.raises(UserError, match="pipes run programs"):
        _tars(f"pipe:touch {tmp_path}/evil")
    assert not (tmp_path / "evil").exists()


def test_a_folder_may_be_called_zip_and_a_zip_anything(tmp_path):
    for name in ("photos.zip", "photos.tar"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(_png())
    config = PreprocessConfig(source_url=str(tmp_path / "photos.zip"), dest=str(tmp_path / "out"), size=8)
    assert preprocess(config).num_samples == 1
    _tar(tmp_path / "photos.tar" / "x.tar", ["1.png"])
    assert _tars(tmp_path / "photos.tar") == (["x.tar/1.png"], {".png": 1, "links and special files in tars": 1})
    with zipfile.ZipFile(tmp_path / "comic.cbz", "w") as archive:
        archive.writestr("a.png", _png())
    source = open_source(config.replace(source_url=str(tmp_path / "comic.cbz")))
    assert source.list_images() == [("a.png", len(_png()))]


def test_a_destination_inside_the_source_never_becomes_a_source(folder):
    (folder / "bad.png").write_bytes(b"junk")
    config = PreprocessConfig(source_url=str(folder), dest=str(folder / "out"), size=8, policy="quarantine")
    first = preprocess(config)
    again = preprocess(config)
    assert (again.num_images, again.num_shards_kept) == (first.num_images, 1)
    assert preprocess(config.replace(dest=str(folder / "other"))).num_images == first.num_images
    with pytest.raises(UserError, match="is the source itself"):
        preprocess(config.replace(dest=str(folder)))


def test_many_kinds_are_said_in_one_line():
    kinds = {f".k{n:02d}": 20 - n for n in range(12)}
    assert said(kinds).endswith("11 .k09, 19 of 2 other kinds") and said({}) == ""
    kinds = {"linked folders": 1, "NAS thumbnails": 12, ".xls": 1, "special files": 1}
    assert said(kinds) == "12 NAS thumbnails, 1 .xls, 1 linked folder, 1 special file"


def test_annotations_count_as_files_of_the_list_rules(folder):
    config = PreprocessConfig(source_url=str(folder), dest="x", members=("mask.png",))
    assert sorted(image for image, _ in open_source(config).list_images()) == ["00000.mask.png", "only.mask.png"]
