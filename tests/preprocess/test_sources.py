"""Every source in its published layout: ids, splits, traps."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import lmdb
import pytest
from PIL import Image

from pipeline.errors import UserError
from preprocess.config import PreprocessConfig
from preprocess.plan import assign_splits
from preprocess.run import preprocess
from preprocess.shards.loader import ShardLoader
from preprocess.sources import SOURCES, open_source


def _image(kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(buffer, kind)
    return buffer.getvalue()


def _write(folder: Path, *names: str, data: bytes | None = None) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or _image())


def _config(source: str, folder: Path, **changes: object) -> PreprocessConfig:
    return PreprocessConfig(source=source, source_url=str(folder), dest=str(folder.parent / "out"), size=8, **changes)  # type: ignore[arg-type]


def _splits(config: PreprocessConfig) -> dict[str, list[str]]:
    source = open_source(config)
    return assign_splits(config, source, sorted(image for image, _ in source.list_images()))


def test_every_listed_source_reports_a_wrong_place_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in SOURCES:
        with pytest.raises(UserError) as error:
            source = open_source(_config(name, tmp_path / "empty"))
            source.list_images()
        assert "\n" not in str(error.value) and "empty" in str(error.value)


def test_folder_takes_images_at_any_depth_and_leaves_the_rest(tmp_path):
    _write(tmp_path / "in", "a.png", "b/c/d.JPG", "notes.txt", ".hidden/x.png", "b/.y.png")
    assert sorted(i for i, _ in open_source(_config("folder", tmp_path / "in")).list_images()) == ["a.png", "b/c/d.JPG"]


def test_folder_reads_a_zip_in_place_and_never_writes_its_names(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("x/a.png", _image())
        archive.writestr("__MACOSX/x/._a.png", b"junk")
    assert preprocess(_config("folder", tmp_path / "in.zip")).num_images == 1
    with zipfile.ZipFile(tmp_path / "in.zip", "a") as archive:
        archive.writestr("../../evil.png", _image())
    with pytest.raises(UserError, match="points outside the archive"):
        preprocess(_config("folder", tmp_path / "in.zip"))
    assert not list(tmp_path.parent.glob("evil.png")) and not list(tmp_path.rglob("evil.png"))


def test_ffhq_official_split_facts_and_md5(tmp_path):
    root = tmp_path / "ffhq"
    names = ["images1024x1024/00000/00007.png", "images1024x1024/59000/59999.png", "images1024x1024/60000/60000.png"]
    _write(root, *names)
    good, bad = hashlib.md5(_image()).hexdigest(), "0" * 32
    records = {
        str(number): {
            "metadata": {"author": "A. Uthor", "license": "CC BY 2.0", "photo_url": "http://x"},
            "image": {"file_path": name, "file_md5": bad if number == 2 else good},
        }
        for number, name in enumerate(names)
    }
    (root / "ffhq-dataset-v2.json").write_text(json.dumps(records))
    config = _config("ffhq", root)
    assert _splits(config) == {"train": names[:2], "val": names[2:]}
    source = open_source(config)
    assert source.info(names[0])["licence"] == "CC BY 2.0" and source.info(names[0])["author"] == "A. Uthor"
    assert source.check(names[0], _image()) is None
    with pytest.raises(UserError, match="60000.png cannot be used .wrong_checksum"):
        preprocess(config)
    assert preprocess(config.replace(check_md5=False)).num_samples == 3


def _ffhq_json(folder: Path, number: int, md5: dict[str, str]) -> None:
    """The data set's JSON with one face in its three renditions, each with its own MD5."""
    places = {
        "image": f"images1024x1024/00000/{number:05d}.png",
        "thumbnail": f"thumbnails128x128/00000/{number:05d}.png",
        "in_the_wild": f"in-the-wild-images/00000/{number:05d}.png",
    }
    record: dict[str, object] = {name: {"file_path": places[name], "file_md5": md5[name]} for name in places}
    record["metadata"] = {"author": "A. Uthor", "license": "CC BY 2.0"}
    (folder / "ffhq-dataset-v2.json").write_text(json.dumps({str(number): record}))


def test_ffhq_takes_each_face_once_from_the_official_root_and_finds_the_md5_of_each_rendition(tmp_path):
    root = tmp_path / "ffhq"
    kinds = {"image": "images1024x1024", "thumbnail": "thumbnails128x128", "in_the_wild": "in-the-wild-images"}
    contents = {name: _image(size=(20 + n, 20)) for n, name in enumerate(kinds)}
    for name, folder in kinds.items():
        _write(root, f"{folder}/00000/00007.png", data=contents[name])
    _ffhq_json(root, 7, {name: hashlib.md5(data).hexdigest() for name, data in contents.items()})
    assert [i for i, _ in open_source(_config("ffhq", root)).list_images()] == ["images1024x1024/00000/00007.png"]
    for name, folder in kinds.items():
        source = open_source(_config("ffhq", root / folder))
        assert source.info("00000/00007.png")["licence"] == "CC BY 2.0"
        assert source.check("00000/00007.png", contents[name]) is None
        assert source.check("00000/00007.png", contents[name] + b" ")


def test_ffhq_flat_names_get_licence_and_md5_by_number(tmp_path):
    root = tmp_path / "ffhq"
    _write(root, "52535.png")
    _ffhq_json(root, 52535, dict.fromkeys(("image", "thumbnail", "in_the_wild"), hashlib.md5(_image()).hexdigest()))
    source = open_source(_config("ffhq", root))
    assert source.info("52535.png") == {"licence": "CC BY 2.0", "author": "A. Uthor"}
    assert source.check("52535.png", _image()) is None
    _write(root, "52535.png", data=_image(size=(9, 9)))
    with pytest.raises(UserError, match="52535.png cannot be used .wrong_checksum.*--no-check-md5"):
        preprocess(_config("ffhq", root))
    assert preprocess(_config("ffhq", root, check_md5=False)).num_samples == 1


def test_ffhq_ldm_split_reads_its_lists_and_leaves_out_the_rest(tmp_path, capsys):
    root = tmp_path / "ffhq"
    _write(root, "00000.png", "00001.png", "61000.png")
    (root / "ffhqtrain.txt").write_text("61000.png\n")
    (root / "ffhqvalidation.txt").write_text("00001.png\n")
    assert _splits(_config("ffhq", root, split="ldm")) == {"train": ["61000.png"], "val": ["00001.png"]}
    (root / "ffhqtrain.txt").write_text("61000.png\n62000.png\n")
    source = open_source(_config("ffhq", root, split="ldm"))
    assert len(source.list_images()) == 2 and source.left_out()["in neither list"] == 1
    assert "1 listed images are not in" in capsys.readouterr().err
    (root / "ffhqvalidation.txt").write_text("61000.png\n")
    with pytest.raises(UserError, match="both name image 61000"):
        _splits(_config("ffhq", root, split="ldm"))


def test_celebahq_lists_name_npy_files(tmp_path):
    root = tmp_path / "celeba"
    _write(root, "0.jpg", "12.jpg", "29999.jpg", data=_image("JPEG"))
    (root / "celebahqtrain.txt").write_text("imgHQ00012.npy\nimgHQ00000.npy\n")
    (root / "celebahqvalidation.txt").write_text("imgHQ29999.npy\n")
    assert _splits(_config("celebahq", root, split="ldm")) == {"train": ["0.jpg", "12.jpg"], "val": ["29999.jpg"]}
    (tmp_path / "mine.txt").write_text("imgHQ00012.npy\n")
    assert _splits(_config("celebahq", root, val_list=str(tmp_path / "mine.txt")))["val"] == ["12.jpg"]


def _database(path: Path, values: dict[str, bytes]) -> None:
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for name, value in values.items():
            transaction.put(name.encode(), value)


def test_lsun_databases_are_read_directly_with_jpeg_webp_and_empty_values(tmp_path):
    root = tmp_path / "lsun"
    keys = [hashlib.sha1(bytes([n])).hexdigest() for n in range(4)]
    _database(root / "tower_train_lmdb", {keys[0]: _image("JPEG"), keys[1]: _image("WEBP"), keys[2]: b""})
    _database(root / "tower_val_lmdb", {keys[3]: _image("WEBP")})
    both = _config("lsun", root, policy="skip", max_reject_fraction=0.5)
    assert _splits(both) == {"train": sorted(f"train/{k}" for k in keys[:3]), "val": [f"val/{keys[3]}"]}
    summary = preprocess(both)
    assert (summary.num_images, summary.num_samples, summary.num_rejected) == (4, 3, 1)
    ledger = [json.loads(line) for line in Path(both.dest, "rejects.jsonl").read_text().splitlines()]
    assert ledger == [{"id": f"train/{keys[2]}", "reason": "empty", "detail": "0 bytes", "num_samples": 1}]
    single = _config("lsun", root / "tower_val_lmdb")
    assert _splits(single) == {"val": [keys[3]]}
    assert _splits(both.replace(split="train")) == {"train": sorted(keys[:3])}


def test_lsun_split_lists_carve_validation_out_of_train(tmp_path):
    keys = sorted(hashlib.sha1(bytes([n])).hexdigest() for n in range(3))
    _database(tmp_path / "bedroom_train_lmdb", dict.fromkeys(keys, _image()))
    (tmp_path / "val.txt").write_text(f"{keys[1]}.jpg\n")
    found = _splits(_config("lsun", tmp_path / "bedroom_train_lmdb", val_list=str(tmp_path / "val.txt")))
    assert found == {"train": [keys[0], keys[2]], "val": [keys[1]]}


def test_lsun_exported_folder(tmp_path):
    name = hashlib.sha1(b"x").hexdigest()
    _write(tmp_path / "in", f"{'/'.join(name[:6])}/{name}.webp", data=_image("WEBP"))
    assert list(_splits(_config("lsun", tmp_path / "in"))["train"]) == [f"{'/'.join(name[:6])}/{name}.webp"]


def test_div2k_flickr2k_and_both(tmp_path):
    root = tmp_path / "df2k"
    _write(root, "DIV2K_train_HR/0001.png", "DIV2K_valid_HR/0801.png", "DIV2K_train_LR_bicubic/X2/0001x2.png")
    _write(root, "DIV2K_train_LR_unknown/0002.png", "Flickr2K/Flickr2K_HR/000001.png")
    assert _splits(_config("div2k", root)) == {"train": ["DIV2K_train_HR/0001.png"], "val": ["DIV2K_valid_HR/0801.png"]}
    assert _splits(_config("flickr2k", root)) == {"train": ["Flickr2K/Flickr2K_HR/000001.png"]}
    assert len(_splits(_config("df2k", root))["train"]) == 2
    assert _splits(_config("div2k", root, split="val")) == {"val": ["DIV2K_valid_HR/0801.png"]}


def test_div2k_crops_are_at_full_resolution_and_a_grid_covers_the_image(tmp_path):
    _write(tmp_path / "in", "0001.png", data=_image(size=(24, 20)))
    random = _config("div2k", tmp_path / "in", crops_per_image=3)
    grid = _config("div2k", tmp_path / "in", crop="grid")
    boxes = {}
    for config in (random, grid):
        shutil.rmtree(config.dest, ignore_errors=True)
        preprocess(config)
        with tarfile.open(Path(config.dest, "shard-000000.tar")) as tar:
            infos = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith("json")]
        boxes[config.crop] = [tuple(info["box"]) for info in infos]
        assert all((b - t, r - le) == (8, 8) for t, le, b, r in boxes[config.crop])
    assert len(set(boxes["auto"])) == 3
    covered = {(y, x) for t, le, b, r in boxes["grid"] for y in range(t, b) for x in range(le, r)}
    assert len(covered) == 24 * 20 and len(boxes["grid"]) == 9


def _tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(_image())
            tar.addfile(info, io.BytesIO(_image()))


def test_webdataset_reads_tars_in_place(tmp_path):
    (tmp_path / "in").mkdir()
    _tar(tmp_path / "in" / "a.tar", ["x/1.png", "x/1.json", "2.jpg"])
    _tar(tmp_path / "in" / "b.tar", ["x/1.png"])
    config = _config("webdataset", tmp_path / "in")
    assert _splits(config) == {"train": ["a.tar/2.jpg", "a.tar/x/1.png", "b.tar/x/1.png"]}
    assert preprocess(config).num_samples == 3
    with ShardLoader(config.dest, batch_size=3) as loader:
        assert next(iter(loader)).pixels.shape == (3, 3, 8, 8)


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png"])
def test_a_tar_that_points_outside_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    _tar(tmp_path / "in" / "a.tar", ["ok.png", name])
    with pytest.raises(UserError, match="points outside the archive"):
        preprocess(_config("webdataset", tmp_path / "in"))
    assert not Path(tmp_path / "out").exists()
