"""A bundle whose config.json is not what it should be: one line, whatever it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_direct import direct_bundle

from orchestration.registry import versions as registry
from pipeline import starter
from pipeline.bundle import load_bundle, save_bundle
from pipeline.errors import UserError
from pipeline.model import LatentZoom


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bundle(str(tmp_path / "bundle"), direct_bundle())
    return tmp_path / "bundle"


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"", b"[]", b"3", b"{", b'{"format": "latentzoom-bundle/1"}'])
def test_what_is_no_configuration(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    with pytest.raises(UserError) as error:
        load_bundle(str(folder))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model", "files", "meta"])
@pytest.mark.parametrize("value", [[], None, "x", 3])
def test_fields_of_another_kind(folder: Path, name: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=f"the field {name} is no object"):
        load_bundle(str(folder))


@pytest.mark.parametrize("missing", ["config.json", "autoencoder.safetensors", "decoder.safetensors"])
def test_a_starter_without_one_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    whole = Path(starter.starter_path())
    shutil.copytree(whole, tmp_path / "weights" / whole.name)
    (tmp_path / "weights" / whole.name / missing).unlink()
    monkeypatch.setattr(starter.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match="the installation is damaged; install latentzoom again"):
        LatentZoom.starter()


def test_the_starter_by_its_address_in_python() -> None:
    assert LatentZoom.load("starter:sharp").config == LatentZoom.starter("sharp").config
    with pytest.raises(UserError, match="look 'x' is not known"):
        LatentZoom.load("starter:x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>login</html>", "config.json is a web page, not the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "config.json is a Git LFS pointer"),
        (b"", "config.json is empty"),
        (b'{"_class_name": "AutoencoderKL"}', "is of diffusers, no bundle; .* latentzoom import diffusers"),
        (None, "is a file, and a bundle is a folder"),
    ],
)
def test_what_stands_in_a_bundles_place_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    place = tmp_path / "model"
    if content is None:
        place.write_bytes(b"weights")
    else:
        place.mkdir()
        (place / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_bundle(str(place))
    with pytest.raises(UserError, match=words):
        registry.resolve(str(place))
