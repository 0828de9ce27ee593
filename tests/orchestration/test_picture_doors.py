"""The command, evaluation and the served model read and write pictures with the same care as Python does."""

import base64
import io
import struct

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny_bundle import tiny_config

from orchestration.cli import main
from orchestration.registry.served_model import decode_picture, encode_png
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, save_bundle
from pipeline.errors import UserError
from pipeline.model import LatentZoom
from training.evaluation.data import open_pictures


def photo(height=20, width=30):
    coarse = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def sideways(folder):
    """A photograph stored on its side, with a tag that Pillow reads and cannot write."""
    body = struct.pack("<H", 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x11A, 2, 3, b"72\0")
    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", 0)
    photo().transpose(Image.Transpose.ROTATE_90).save(folder / "sideways.png", exif=block)
    return folder / "sideways.png"


def deep_grey(folder):
    values = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    tifffile.imwrite(folder / "deep.tif", 65535 - values, photometric="miniswhite")
    return folder / "deep.tif"


@pytest.fixture(scope="module")
def starter():
    return LatentZoom.starter()


@pytest.mark.parametrize(("make", "mode"), [(sideways, "RGB"), (deep_grey, "L")])
def test_command_python_and_served_model_agree(starter, tmp_path, make, mode):
    file = make(tmp_path)
    right = np.asarray(starter.upscale(photo().convert(mode), 2)).astype(int)
    assert main(["upscale", "--device", "cpu", "--scale", "2", str(file), str(tmp_path / "out.png")]) == 0
    picture = decode_picture(base64.b64encode(file.read_bytes()).decode())
    served = io.BytesIO(base64.b64decode(encode_png(starter.upscale(picture, 2))))
    for door in (tmp_path / "out.png", served):
        with Image.open(door) as made:
            assert made.mode == mode and np.abs(np.asarray(made).astype(int) - right).max() <= 1
    assert np.array_equal(np.asarray(starter.upscale(file, 2)), right)


def test_evaluation_sees_what_a_viewer_sees(tmp_path):
    sideways(tmp_path), deep_grey(tmp_path)
    grey, turned = open_pictures(str(tmp_path)).read(0, 2)
    assert np.array_equal(turned.permute(1, 2, 0).numpy(), np.asarray(photo()))
    assert np.array_equal(grey[0].numpy(), np.asarray(photo().convert("L")))


def test_a_damaged_picture_is_one_line_through_every_door(starter, tmp_path, capsys):
    photo(200, 300).save(buffer := io.BytesIO(), "JPEG", quality=92)
    data = buffer.getvalue()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert (
        main(["upscale", "--device", "cpu", "--scale", "2", *map(str, (tmp_path / "half.jpg", tmp_path / "o.png"))])
        == 2
    )
    assert "half.jpg cannot be read as a picture: damaged" in capsys.readouterr().err.splitlines()[-1]
    for door in (
        lambda: starter.upscale(tmp_path / "half.jpg", 2),
        lambda: starter.upscale(Image.open(tmp_path / "half.jpg"), 2),
        lambda: open_pictures(str(tmp_path)).read(0, 1),
        lambda: decode_picture(base64.b64encode((tmp_path / "half.jpg").read_bytes()).decode()),
    ):
        with pytest.raises(UserError, match="cannot be read as a picture: damaged"):
            door()


def test_an_overflow_in_half_precision_is_one_line_and_no_file(tmp_path, capsys):
    torch.manual_seed(0)
    config = tiny_config()
    bundle = Bundle(config, build_autoencoder(config), build_decoder(config), build_denoiser(config))
    bundle.decoder.trunk.conv_in.weight.data *= 3e5
    save_bundle(str(tmp_path / "bundle"), bundle)
    photo(8, 8).save(tmp_path / "in.png")
    common = ["--model", str(tmp_path / "bundle"), "--device", "cpu", "--dtype", "float16"]
    for command in (
        ["upscale", *common, "--scale", "2", str(tmp_path / "in.png"), str(tmp_path / "out.png")],
        ["generate", *common, "--size", "32", "--steps", "1", "--out", str(tmp_path / "out.png")],
    ):
        assert main(command) == 2
        assert "--dtype float32 or bfloat16" in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "out.png").exists()
