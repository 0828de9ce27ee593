"""The starter: found in the package, loaded without network, enlarging by any factor; a damaged one is one line."""

from __future__ import annotations

import fnmatch
import shutil
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
import pipeline.starter
from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from pipeline.images import to_tensor
from pipeline.model import LatentZoom
from pipeline.starter import LOOKS, Look, starter_or, starter_path
from pipeline.tiling import TiledDecoder

PACKAGE = Path(pipeline.__file__).parent
MAX_BYTES = 5_000_000


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        pytest.fail("it asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("look", LOOKS)
def test_it_enlarges_by_any_factor_without_network(look: Look, no_network: None) -> None:
    model = LatentZoom.starter(look)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8))
    for scale in (0.7, 1, 2, 3.3, 8):
        made = model.upscale(image, scale)
        assert (made.height, made.width) == (round(21 * scale), round(34 * scale)) and made.mode == "RGB"
    smooth = Image.fromarray(np.full((21, 34, 3), (200, 90, 40), np.uint8))
    even = np.asarray(model.upscale(smooth, 4)).astype(int)
    assert np.abs(even[12:-12, 12:-12] - (200, 90, 40)).max() <= 8  # whatever it has learnt, an even patch stays so


def test_the_default_look_is_the_faithful_one() -> None:
    default, faithful = LatentZoom.starter(), LatentZoom.starter("faithful")
    assert default.decoder is not None and faithful.decoder is not None
    for name, tensor in faithful.decoder.state_dict().items():
        assert torch.equal(tensor, default.decoder.state_dict()[name])


@pytest.mark.parametrize("look", LOOKS)
def test_it_is_what_the_documentation_says(look: Look) -> None:
    """Direct, in pixel space, without norms, so tiles agree exactly; a licence and a card that names photographs."""
    bundle = load_bundle(starter_path(look))
    config = bundle.config
    assert (config.task, config.autoencoder.kind, config.decoder.norm) == ("direct", "identity", "none")
    assert bundle.denoiser is None and bundle.meta["licence"] == "CC-BY-SA-4.0"
    for words in ("## Photographs", "Held out", "CC-BY-SA-4.0", "make starter"):
        assert words in bundle.card
    model = LatentZoom(bundle)
    assert model.decoder is not None
    latent = to_tensor(Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)))
    tiled = TiledDecoder(model.decoder, latent, (115, 161), model.tiling(32)).window((0, 0, 115, 161))
    assert float((tiled - model.decode(latent, (115, 161))).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_hardly_a_level(dtype: torch.dtype) -> None:
    """All but the residual blocks stays exact: rounding the picture itself to bfloat16 would cost up to half a level a
    pixel before anything is computed."""
    pixels = np.random.default_rng(2).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((48, 36), Image.Resampling.BICUBIC)
    exact, rounded = LatentZoom.starter(), LatentZoom.starter(dtype=dtype)
    assert rounded.decoder is not None and rounded.decoder.head.out.weight.dtype == torch.float32
    first, second = (np.asarray(model.upscale(image, 2.5)).astype(int) for model in (exact, rounded))
    assert 0 < np.abs(first - second).mean() < 0.1 and np.abs(first - second).max() <= 2


def test_every_file_of_it_is_package_data_and_all_are_small() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [*settings["package-data"]["*"], *settings["package-data"]["pipeline"]]
    files = [file for file in (PACKAGE / "weights").rglob("*") if file.is_file()]
    names = {file.relative_to(PACKAGE).as_posix() for file in files}
    for look in LOOKS:
        for name in ("config.json", "autoencoder.safetensors", "decoder.safetensors", "README.md"):
            assert f"weights/starter-{look}/{name}" in names
    for name in names:
        depth = name.count("/")
        assert any(p.count("/") == depth and fnmatch.fnmatch(name, p) for p in patterns), f"{name} is in no wheel"
    assert sum(file.stat().st_size for file in files) < MAX_BYTES


@pytest.mark.parametrize("look", ["", "soft", "faithful ", "../starter-faithful", "Faithful"])
def test_unknown_looks_name_the_known_ones(look: str) -> None:
    with pytest.raises(UserError, match="is not known; use faithful or sharp") as error:
        starter_path(look)
    assert "\n" not in str(error.value)


def test_addresses_of_the_starter_and_of_others() -> None:
    assert starter_or("starter") == starter_or("starter:faithful") == starter_path()
    assert starter_or("starter:sharp") == starter_path("sharp") != starter_path()
    for other in ("", "starters", "starter-runs/bundle", "./starter", "models:/starter@champion", "s3://b/starter"):
        assert starter_or(other) == other
    with pytest.raises(UserError, match="look 'gloomy'"):
        starter_or("starter:gloomy")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installation's weights, to be damaged."""
    shutil.copytree(PACKAGE / "weights", tmp_path / "weights")
    monkeypatch.setattr(pipeline.starter.resources, "files", lambda package: tmp_path)
    return tmp_path / "weights" / "starter-faithful"


def _flip(folder: Path) -> None:
    data = bytearray((folder / "decoder.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "decoder.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (shutil.rmtree, "starter model is missing from .*starter-faithful.* install latentzoom again"),
        (lambda folder: (folder / "config.json").unlink(), "starter model is missing .* install latentzoom again"),
        (lambda folder: (folder / "decoder.safetensors").unlink(), "decoder.safetensors"),
        (_flip, "decoder.safetensors is damaged: its SHA-256"),
    ],
)
def test_a_damaged_installation_is_one_line(damage: Callable[[Path], object], named: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(UserError, match=named) as error:
        LatentZoom.starter()
    assert "\n" not in str(error.value)
    assert LatentZoom.starter("sharp").decoder is not None
