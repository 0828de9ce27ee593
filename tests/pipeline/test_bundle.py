"""Bundles come back as they were saved, partial or whole; damage and misfits are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_bundle

from pipeline.bundle import Bundle, load_bundle, save_bundle
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from pipeline.storage import sha256_bytes

PARTS = ["autoencoder", "decoder", "denoiser"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bundle(str(tmp_path / "bundle"), small_bundle("sr"))
    return tmp_path / "bundle"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_weights(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights with the right SHA-256, so that only strict loading can object."""
    save_file(tensors, str(folder / name))
    files = json.loads((folder / "config.json").read_text())["files"]
    edit(folder, files={**files, name: sha256_bytes((folder / name).read_bytes())})


@pytest.mark.parametrize("kind", ["liif", "light"])
def test_roundtrip(kind: str, tmp_path: Path) -> None:
    bundle = small_bundle("sr", kind, seed=3)
    bundle.meta, bundle.card = {"data": "abc", "weights": "ema"}, "# A card\n"
    save_bundle(str(tmp_path / "b"), bundle)
    loaded = load_bundle(str(tmp_path / "b"))
    assert loaded.config == bundle.config and loaded.meta == bundle.meta and loaded.card == bundle.card
    for name in PARTS:
        ours, theirs = getattr(loaded, name), getattr(bundle, name)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert loaded.autoencoder.identity() == bundle.autoencoder.identity()
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["autoencoder_identity"] == bundle.autoencoder.identity()


@pytest.mark.parametrize("parts", [["autoencoder"], ["autoencoder", "decoder"]])
def test_partial_bundles(parts: list[str], tmp_path: Path) -> None:
    whole = small_bundle()
    save_bundle(str(tmp_path), Bundle(whole.config, **{name: getattr(whole, name) for name in parts}))
    loaded = load_bundle(str(tmp_path))
    assert [name for name in PARTS if getattr(loaded, name) is not None] == parts
    model = LatentZoom(loaded)
    with pytest.raises(UserError, match="no denoiser yet"):
        model.sample_latents()
    if "decoder" not in parts:
        with pytest.raises(UserError, match="no implicit decoder yet"):
            model.decode(torch.zeros(1, 3, 8, 8), (9, 9))


def test_object_store() -> None:
    save_bundle("memory://bundles/one", small_bundle())
    assert load_bundle("memory://bundles/one").config.name == "small"


def test_nothing_in_a_bundle_is_pickled(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        *("autoencoder.safetensors", "config.json", "decoder.safetensors", "denoiser.safetensors"),
    ]


def test_identity_follows_encoder_and_configuration_only() -> None:
    one, same, other = (
        small_bundle(seed=1).autoencoder,
        small_bundle(seed=1).autoencoder,
        small_bundle(seed=2).autoencoder,
    )
    assert one.identity() == same.identity() != other.identity()
    same.decoder.conv_in.weight.data += 1
    assert one.identity() == same.identity()
    same.quant_conv.bias.data += 1
    assert one.identity() != same.identity()


@pytest.mark.parametrize("part", PARTS)
def test_damaged_weights(part: str, folder: Path) -> None:
    file = folder / f"{part}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"{part}\.safetensors is damaged"):
        load_bundle(str(folder))
    file.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(UserError, match="is damaged"):
        load_bundle(str(folder))
    file.unlink()
    with pytest.raises(UserError, match=rf"no such file: .*{part}\.safetensors"):
        load_bundle(str(folder))


def test_missing_left_over_and_ill_shaped_weights(folder: Path) -> None:
    tensors = load_file(str(folder / "decoder.safetensors"))
    without = {key: value for key, value in tensors.items() if key != "head.out.bias"}
    replace_weights(folder, "decoder.safetensors", without)
    with pytest.raises(UserError, match=r"missing head\.out\.bias"):
        load_bundle(str(folder))
    replace_weights(folder, "decoder.safetensors", {**tensors, "head.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"left over head\.extra"):
        load_bundle(str(folder))
    replace_weights(folder, "decoder.safetensors", {**tensors, "head.out.bias": torch.zeros(4)})
    with pytest.raises(UserError, match=r"head\.out\.bias is \(4,\), expected \(3,\)"):
        load_bundle(str(folder))


def test_no_bundle_and_half_a_bundle(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="no bundle at"):
        load_bundle(str(tmp_path / "nothing"))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no bundle at"):
        load_bundle(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "latentzoom-bundle/1"}', '"text"'])
def test_damaged_config(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        load_bundle(str(folder))


def test_another_format_and_unknown_fields(folder: Path) -> None:
    model = json.loads((folder / "config.json").read_text())["model"]
    edit(folder, model={**model, "colour": 1})
    with pytest.raises(UserError, match="unknown field colour"):
        load_bundle(str(folder))
    edit(folder, model={**model, "image_size": "32"})
    with pytest.raises(UserError, match="image_size must be int"):
        load_bundle(str(folder))
    edit(folder, format="latentzoom-bundle/9")
    with pytest.raises(UserError, match="bundle/9"):
        load_bundle(str(folder))
