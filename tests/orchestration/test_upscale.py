"""`latentzoom upscale` as a person types it: what survives, pipes, folders that continue, and one line for mistakes."""

import functools
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.source_picture import read_picture
from orchestration.verbs import upscale as upscale_cli


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("upscale") / "bundle", task="sr")


def _upscale(bundle, *arguments):
    return main(["upscale", "--model", bundle, "--device", "cpu", "--steps", "2", *map(str, arguments)])


def picture(height=11, width=17, mode="RGB", seed=0):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


@functools.cache  # it holds the time it was made
def rgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_profile_exif_and_origin_are_kept(bundle, tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112], exif[315] = 6, "Someone"  # turned by 90 degrees
    picture(mode="RGBA").save(tmp_path / "in.png", icc_profile=rgb_profile(), exif=exif)
    assert _upscale(bundle, "--scale", 2.5, tmp_path / "in.png", tmp_path / f"out{suffix}") == 0
    with Image.open(tmp_path / f"out{suffix}") as out:
        assert out.mode == "RGBA" and (out.height, out.width) == (42, 28)  # 17 × 11 upright, × 2.5, rounded
        assert out.info["icc_profile"] == rgb_profile()
        assert out.getexif()[315] == "Someone" and out.getexif().get(0x0112, 1) == 1
        alpha = np.asarray(out.getchannel("A")).astype(int)
    turned = Image.open(tmp_path / "in.png").getchannel("A").transpose(Image.Transpose.ROTATE_270)
    expected = np.asarray(turned.resize((28, 42), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(alpha - expected).mean() < 1.0  # Pillow rounds and clips between its two passes
    if suffix == ".png":
        assert Image.open(tmp_path / "out.png").text["latentzoom:scale"] == "2.471x2.545"


def test_colours_of_a_profile_are_not_converted():
    buffer = io.BytesIO()
    image = picture()
    image.save(buffer, "PNG", icc_profile=rgb_profile())
    source = read_picture(buffer.getvalue(), "x")
    assert np.array_equal(np.asarray(source.image), np.asarray(image)) and source.alpha is None and source.icc
    picture(mode="L").save(buffer := io.BytesIO(), "PNG")
    assert read_picture(buffer.getvalue(), "x").image.mode == "RGB"


def test_a_pipe_gives_the_same_as_a_file(bundle, tmp_path):
    picture().save(tmp_path / "in.png")
    assert _upscale(bundle, "--size", "30x41", tmp_path / "in.png", tmp_path / "out.png") == 0
    command = [sys.executable, "-m", "orchestration.cli", "upscale", "--model", bundle, "--device", "cpu"]
    piped = subprocess.run(
        [*command, "--steps", "2", "--size", "30x41", "-", "-"],
        input=(tmp_path / "in.png").read_bytes(),
        capture_output=True,
        check=True,
    ).stdout
    file, pipe = (np.asarray(Image.open(f)).astype(int) for f in (tmp_path / "out.png", io.BytesIO(piped)))
    assert np.abs(file - pipe).max() <= 1  # another process may have another number of threads


def test_a_folder_continues_where_it_was(bundle, tmp_path, capsys, monkeypatch):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    picture(seed=1).save(tmp_path / "in" / "a.png")
    picture(seed=2).save(tmp_path / "in" / "a.jpg")
    picture(seed=3).save(tmp_path / "in" / "deep" / "b.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG nothing")
    assert _upscale(bundle, "--scale", 2, tmp_path / "in", tmp_path / "out") == 1
    assert "broken.png cannot be read as a picture" in capsys.readouterr().err
    names = sorted(str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*"))
    assert names == ["a.jpg.png", "a.png.png", "deep/b.png"]
    (tmp_path / "out" / "deep" / "b.png").unlink()
    (tmp_path / "in" / "broken.png").unlink()
    done = []
    original = upscale_cli._one
    monkeypatch.setattr(
        upscale_cli, "_one", lambda *args, **options: (done.append(args[4].name), original(*args, **options))
    )
    assert _upscale(bundle, "--scale", 2, tmp_path / "in", tmp_path / "out") == 0
    assert done == ["b.png"]


def test_previews_come_and_go(bundle, tmp_path, monkeypatch):
    picture().save(tmp_path / "in.png")
    seen = []
    original = upscale_cli.Previews.on_step

    def on_step(self, done, total, x0_pred):
        original(self, done, total, x0_pred)
        if self.file.exists():
            seen.append((done, Image.open(self.file).size))

    monkeypatch.setattr(upscale_cli.Previews, "on_step", on_step)
    arguments = ["--steps", "5", "--preview", "2", "--size", "600x1200", tmp_path / "in.png", tmp_path / "out.png"]
    assert _upscale(bundle, *arguments) == 0
    assert seen == [(2, (512, 256)), (3, (512, 256)), (4, (512, 256)), (5, (512, 256))]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.png", "out.png"]


def test_tiles_are_used_when_asked_for(bundle, tmp_path):
    picture(30, 40).save(tmp_path / "in.png")
    assert _upscale(bundle, "--scale", 3, "--tile", 8, tmp_path / "in.png", tmp_path / "tiled.png") == 0
    assert _upscale(bundle, "--scale", 3, "--tile", 64, tmp_path / "in.png", tmp_path / "whole.png") == 0
    tiled, whole = (Image.open(tmp_path / f"{name}.png") for name in ("tiled", "whole"))
    assert tiled.size == whole.size == (120, 90)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in.png", "out.png"], "either --scale or --size"),
        (["--scale", "2", "--size", "5", "in.png", "out.png"], "either --scale or --size"),
        (["--scale", "2", "nothing.png", "out.png"], "no such file"),
        (["--scale", "2", "in.png", "out.jpg"], "write a .png or a .tif"),
        (["--scale", "2", "text.png", "out.png"], "cannot be read as a picture"),
        (["--scale", "2", ".", "-"], "needs a folder"),
        (["--scale", "-1", "in.png", "out.png"], "positive number"),
        (["--scale", "2", "--tile", "-1", "in.png", "out.png"], "use 0 or more"),
    ],
)
def test_mistakes_are_one_line(bundle, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    (tmp_path / "text.png").write_text("text")
    assert _upscale(bundle, *arguments) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
