"""`latentzoom upscale` as a person types it: what survives, pipes, folders that continue, and one line for mistakes."""

import dataclasses
import functools
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tiny_bundle import make_bundle

from orchestration import upscaling
from orchestration.cli import main
from pipeline.model import LatentZoom
from pipeline.reading import read_picture


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
    assert read_picture(buffer.getvalue(), "x").image.mode == "L"


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
    assert names == ["a.jpg", "a.png", "deep/b.png"]
    (tmp_path / "out" / "deep" / "b.png").unlink()
    (tmp_path / "in" / "broken.png").unlink()
    done = []
    original = LatentZoom.latent_of
    monkeypatch.setattr(
        LatentZoom, "latent_of", lambda self, image, **o: (done.append(image.size), original(self, image, **o))[1]
    )
    assert _upscale(bundle, "--scale", 2, tmp_path / "in", tmp_path / "out") == 0
    assert len(done) == 1


def test_a_folder_goes_on_after_a_picture_that_does_not_fit_the_gpu(bundle, tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for name, height in (("a", 9), ("b", 13), ("c", 9)):
        picture(height=height).save(tmp_path / "in" / f"{name}.png")
    original = LatentZoom.latent_of

    def latent_of(self, image, **options):
        if image.size[0] == 13:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return original(self, image, **options)

    monkeypatch.setattr(LatentZoom, "latent_of", latent_of)
    assert _upscale(bundle, "--scale", 2, tmp_path / "in", tmp_path / "out") == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    words = "the GPU has too little memory for it; give a smaller --tile, such as 64 or 32, or --dtype bfloat16"
    assert told == [f"latentzoom: {tmp_path / 'in' / 'b.png'}: {words}"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    assert _upscale(bundle, "--scale", 2, tmp_path / "in" / "b.png", tmp_path / "b.png") == 2
    assert f"error: {tmp_path / 'in' / 'b.png'}: {words}" in capsys.readouterr().err


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_is_allowed_brings_no_warning(bundle, tmp_path, monkeypatch):
    picture().save(tmp_path / "in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns from here, and refuses twice as many
    assert _upscale(bundle, "--scale", 2, tmp_path / "in.png", tmp_path / "out.png") == 0


def test_previews_come_and_go(bundle, tmp_path, monkeypatch):
    picture().save(tmp_path / "in.png")
    seen = []
    original = upscaling.Previews.on_step

    def on_step(self, done, total, x0_pred):
        original(self, done, total, x0_pred)
        if self.file.exists():
            seen.append((done, Image.open(self.file).size))

    monkeypatch.setattr(upscaling.Previews, "on_step", on_step)
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


def png_of_16_bits(values, colour_type, clear):
    """The clear colour is transparent (tRNS)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"tRNS", np.array(clear).astype(">u2").tobytes())
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("colour_type", [0, 2])
def test_the_clear_colour_of_16_bits_is_transparent(colour_type):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3) if colour_type == 2 else (5, 7))
    source = read_picture(png_of_16_bits(values, colour_type, values[2, 3]), "x")
    assert [tuple(place) for place in np.argwhere(np.asarray(source.alpha) == 0)] == [(2, 3)]
    colours = np.asarray(source.image.convert("RGB")).astype(int)
    expected = np.broadcast_to((values / 257).reshape(5, 7, -1), (5, 7, 3))
    assert np.abs(colours - expected).max() <= 0.51


@pytest.mark.parametrize("order", "<>")
def test_exif_is_kept_byte_for_byte_but_for_its_orientation(order):
    entries = [(0x0112, 3, 1, struct.pack(order + "HH", 6, 0)), (33432, 2, 7, struct.pack(order + "I", 38))]
    block = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    block += b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    block += struct.pack(order + "I", 9999) + "© Jörg".encode("latin-1") + b"\0"
    picture().save(buffer := io.BytesIO(), "JPEG", exif=b"Exif\0\0" + block)
    source = read_picture(buffer.getvalue(), "x")
    assert source.image.size == (11, 17)
    entries[0] = (*entries[0][:3], struct.pack(order + "HH", 1, 0))
    assert source.exif == block.replace(struct.pack(order + "HH", 6, 0), entries[0][3]).replace(
        struct.pack(order + "I", 9999), bytes(4)
    )


def test_exif_of_a_tiff_is_kept_without_its_layout():
    exif = Image.Exif()
    exif[0x0112], exif[315] = 6, "Someone"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    picture().save(buffer := io.BytesIO(), "TIFF", exif=exif.tobytes())
    kept = Image.Exif()
    kept.load(read_picture(buffer.getvalue(), "x").exif)
    assert set(kept) == {315, 0x8769} and kept.get_ifd(0x8769) == {0x9003: "2020:01:02 03:04:05"}


def test_a_broken_exif_block_does_no_harm():
    for block in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"junk"):
        picture().save(buffer := io.BytesIO(), "JPEG", exif=block)
        assert read_picture(buffer.getvalue(), "x").exif is None


def test_names_never_meet(bundle, tmp_path):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(["a.png", "a.bmp", "a.bmp.png"]):
        picture(8 + seed, 9).save(tmp_path / "in" / name)
    assert _upscale(bundle, "--scale", 2, tmp_path / "in", tmp_path / "out") == 0
    heights = {file.name: Image.open(file).height for file in (tmp_path / "out").iterdir()}
    assert heights == {"a.png.png": 16, "a.bmp.png": 18, "a.bmp.png.png": 20}


def test_an_output_folder_inside_the_input_is_not_read(bundle, tmp_path):
    picture().save(tmp_path / "a.png")
    for _ in range(2):
        assert _upscale(bundle, "--scale", 2, tmp_path, tmp_path / "out") == 0
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["a.png", "a.png", "out"]


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_pipe_that_breaks_is_one_line(bundle, tmp_path, reader):
    picture().save(tmp_path / "in.png")
    if reader == "full" and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    if reader == "gone":
        end, stdout = os.pipe()
        os.close(end)
    else:
        stdout = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-m", "orchestration.cli", "upscale", "--model", bundle, "--device", "cpu"]
    done = subprocess.run(
        [*command, "--steps", "1", "--size", "30x30", str(tmp_path / "in.png"), "-"],
        stdout=stdout,
        stderr=subprocess.PIPE,
    )
    os.close(stdout)
    last = done.stderr.decode().strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("latentzoom: error: cannot write to standard output")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in.png", "out.png"], "give exactly one of --scale, --size"),
        (["--scale", "2", "--size", "5x5", "in.png", "out.png"], "give exactly one of --scale, --size"),
        (["--scale", "2", "nothing.png", "out.png"], "no such file"),
        (["--scale", "2", "in.png", "out.gif"], "write a .png, .tif, .jpg, .webp or .avif file"),
        (["--scale", "2", "text.txt", "out.png"], "cannot be read as a picture"),
        (["--scale", "2"], "no picture is given"),
        (["--scale", "2", "in.png"], "where shall the result of in.png go?"),
        (["--scale", "2", "in.png", "other.png"], "if both are inputs, give a folder at the end (out/)"),
        (["--scale", "2", "in.png", "other.png", "in.png"], "are all pictures that are there"),
        (["--scale", "2", "in.png", "other.png", "new.png"], "write it as new.png/"),
        (["--scale", "2", "in.png", "other.png", "."], "is what is read"),
        (["--scale", "2", "-", "out/"], "has no name"),
        (["--size", "480", "in.png", "out.png"], "--longest 480"),
        (["--width", "48", "--height", "48", "in.png", "out.png"], "--size 48x48"),
        (["--longest", "0", "in.png", "out.png"], "--longest 0 is not allowed"),
        (["--megapixels", "nan", "in.png", "out.png"], "--megapixels nan is not allowed"),
        (["--scale", "2", "--quality", "101", "in.png", "out.jpg"], "use 1 to 100"),
        (["--scale", "2000", "in.png", "out.webp"], "WebP holds at most 16383 pixels a side"),
        (["--scale", "2", ".", "-"], "need a folder to write to, not -"),
        (["--scale", "-1", "in.png", "out.png"], "positive number"),
        (["--scale", "1e308", "in.png", "out.png"], "positive number"),
        (["--scale", "2", "in.png", "in.png"], "write to another file"),
        (["--scale", "2", ".", "../here"], "write to another folder"),
        (["--scale", "2", "in.png", "text.txt/out.png"], "is not a folder"),
        (["--scale", "2", "in.png", "text.txt/"], "is not a folder"),
        (["--scale", "2", "--device", "tpu", "in.png", "out.png"], "--device tpu is not allowed"),
        (["--scale", "2", "--device", "meta", "in.png", "out.png"], "--device meta is not allowed"),
        (["--scale", "2", "--tile", "-1", "in.png", "out.png"], "use 0 or more"),
    ],
)
def test_mistakes_are_one_line(bundle, tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    picture().save("in.png")
    picture(seed=1).save("other.png")
    Path("text.txt").write_text("text")
    before = Path("in.png").read_bytes(), Path("other.png").read_bytes()
    assert _upscale(bundle, *arguments) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert (Path("in.png").read_bytes(), Path("other.png").read_bytes()) == before
    assert sorted(file.name for file in Path().iterdir()) == ["in.png", "other.png", "text.txt"]


def test_noise_on_the_condition_from_the_command_line(tmp_path, capsys):
    """What the option does is what Python's argument does; models that were not trained for it say so in one line."""
    from tiny_bundle import tiny_config

    config = tiny_config("sr")
    config = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, condition_noise=0.5))
    noisy = make_bundle(tmp_path / "noisy", config=config)
    picture(8, 9).save(tmp_path / "in.png")
    assert _upscale(noisy, "--scale", 2, "--condition-noise", 0.4, tmp_path / "in.png", tmp_path / "out.png") == 0
    expected = LatentZoom.load(noisy).upscale(picture(8, 9), 2, num_steps=2, condition_noise=0.4)
    made = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert np.abs(made - np.asarray(expected)).max() <= 1
    assert np.abs(made - np.asarray(LatentZoom.load(noisy).upscale(picture(8, 9), 2, num_steps=2))).max() > 1
    assert _upscale(noisy, "--scale", 2, "--condition-noise", 0.6, tmp_path / "in.png", tmp_path / "other.png") == 2
    assert "condition_noise = 0.6 is not allowed; this model was trained with up to 0.5" in capsys.readouterr().err
