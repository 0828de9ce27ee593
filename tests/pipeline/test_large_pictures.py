"""Files written window by window: what Pillow reads back is what was drawn, in memory that does not grow with them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from small_models import small_bundle

from pipeline import canvas
from pipeline.canvas import Facts, write_canvas, write_png
from pipeline.drawing import Drawing
from pipeline.errors import UserError
from pipeline.metrics.speed import measure
from pipeline.tiling import Tiling
from pipeline.windows import resize_window


def picture_of(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(700, 1300), (1, 1), (513, 3)])
def test_what_is_read_is_what_was_drawn(tmp_path: Path, suffix: str, channels: int, size: tuple[int, int]) -> None:
    pixels = picture_of(*size, channels)
    counted: list[int] = []
    target = tmp_path / "new" / f"picture{suffix}"
    write_canvas(target, size, lambda w: pixels[w[0] : w[2], w[1] : w[3]], channels=channels, on_pixels=counted.append)
    with Image.open(target) as picture:
        picture.load()
        assert np.array_equal(np.asarray(picture).reshape(*size, channels), pixels)
    assert sum(counted) == size[0] * size[1]
    assert [f.name for f in target.parent.iterdir()] == [target.name]


def test_tiff_is_big_and_tiled(tmp_path: Path) -> None:
    pixels = picture_of(600, 520, 3)
    write_canvas(tmp_path / "a.tif", (600, 520), lambda w: pixels[w[0] : w[2], w[1] : w[3]])
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_bigtiff and tiff.pages[0].is_tiled


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_facts_are_kept(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[271], exif[306] = "Maker", "2020:01:02 03:04:05"
    facts = Facts(text={"Software": "latentzoom", "seed": "é 5"}, icc=b"profile", exif=exif.tobytes())
    write_canvas(tmp_path / f"a{suffix}", (3, 4), lambda w: picture_of(3, 4, 3), facts=facts)
    with Image.open(tmp_path / f"a{suffix}") as picture:
        assert picture.info["icc_profile"] == b"profile"
        assert picture.getexif()[271] == "Maker" and picture.getexif()[306] == "2020:01:02 03:04:05"
        if suffix == ".png":
            assert picture.text == dict(facts.text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("moment", ["2020:01:02 03:04", "    :  :     :  :  ", ""])
def test_odd_exif_does_not_stop_a_tiff(tmp_path: Path, moment: str) -> None:
    exif = Image.Exif()
    exif[306], exif[315] = moment, "J_rg"
    block = exif.tobytes().replace(b"J_rg", "Jörg".encode("latin-1"))
    write_canvas(tmp_path / "a.tif", (3, 4), lambda w: picture_of(3, 4, 3), facts=Facts(exif=block))
    with Image.open(tmp_path / "a.tif") as picture:
        assert picture.getexif()[315] == "Jörg" and 306 not in picture.getexif()


def test_a_pipe_that_cannot_seek() -> None:
    class Pipe(io.RawIOBase):
        data = b""

        def write(self, part) -> int:  # type: ignore[no-untyped-def]
            self.data += bytes(part)
            return len(part)

    pipe, pixels = Pipe(), picture_of(40, 30, 3)
    write_png(pipe, (40, 30), lambda w: pixels[w[0] : w[2], w[1] : w[3]])  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(pipe.data))), pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_an_interrupted_file_leaves_nothing(tmp_path: Path, suffix: str) -> None:
    def draw(window: tuple[int, int, int, int]) -> np.ndarray:
        if window[0] > 0:
            raise KeyboardInterrupt
        return np.zeros((window[2] - window[0], window[3] - window[1], 3), np.uint8)

    with pytest.raises(KeyboardInterrupt):
        write_canvas(tmp_path / f"a{suffix}", (3000, 10), draw)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="write a .png, .tif"):
        write_canvas(tmp_path / "a.gif", (3, 3), lambda w: picture_of(3, 3, 3))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_canvas(tmp_path / "file" / "a.png", (3, 3), lambda w: picture_of(3, 3, 3))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8192² pixels of 3 bytes are 201 MB; bands and windows of a 64th of that are all that is held."""
    monkeypatch.setattr(canvas, "_BAND_BYTES", 4 << 20)
    tile = np.zeros((canvas.WINDOW, canvas.WINDOW, 3), np.uint8)

    def run() -> None:
        write_canvas(tmp_path / f"a{suffix}", (8192, 8192), lambda w: tile[: w[2] - w[0], : w[3] - w[1]])

    peak = measure(run, num=1)[1]
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert peak < 40 << 20


def test_a_drawing_is_the_decoded_picture_with_its_alpha() -> None:
    decoder = small_bundle().decoder
    assert decoder is not None
    latent, alpha = torch.randn(1, 3, 8, 8), torch.randint(0, 256, (1, 1, 11, 13), dtype=torch.uint8)
    drawing = Drawing(decoder, latent, (1100, 1030), Tiling(8, 2), alpha)
    whole = np.asarray(drawing.picture())
    with torch.no_grad():
        image = decoder(latent, (1100, 1030), (1000, 1000, 1100, 1030))
    expected = ((image[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(whole[1000:, 1000:, :3].astype(float) - expected).max() <= 1
    expected = resize_window(alpha.float(), (1100, 1030), (0, 0, 1100, 1030)).round().clamp(0, 255)
    assert np.array_equal(whole[:, :, 3], expected[0, 0].numpy().astype(np.uint8))


def test_an_absurd_size_is_drawn_where_asked() -> None:
    decoder = small_bundle().decoder
    assert decoder is not None
    drawing = Drawing(decoder, torch.randn(1, 3, 8, 8), (1 << 20, 1 << 20), Tiling(8, 2))
    assert drawing.pixels(((1 << 20) - 3, 5, 1 << 20, 9)).shape == (3, 4, 3)
