"""A single picture that is stopped: a large one goes on by its tiles, a small one says that it starts anew."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.pictures import upscaling
from pipeline import canvas
from pipeline.drawing import Drawing
from pipeline.kept import KeptPieces
from pipeline.model import LatentZoom
from pipeline.progress import Progress


@pytest.fixture
def sr_bundle(tmp_path):
    return make_bundle(tmp_path / "bundle", task="sr")


@pytest.fixture
def large(monkeypatch):
    """Every picture counts as large, and is drawn in small windows."""
    monkeypatch.setattr(upscaling, "LARGE_OUTPUT", 1)
    monkeypatch.setattr(canvas, "WINDOW", 64)
    monkeypatch.setattr(canvas, "TIFF_TILE", 64)


def noise(folder, height=40, width=52):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "in.png")
    return str(folder / "in.png")


def counting(monkeypatch, owner, name, stop_at=None):
    """Counts the calls of a method; the one numbered `stop_at` is a Ctrl-C."""
    calls, original = [], getattr(owner, name)

    def method(self, *arguments, **options):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(arguments)
        return original(self, *arguments, **options)

    monkeypatch.setattr(owner, name, method)
    return calls


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_a_stopped_drawing_goes_on_window_by_window(tmp_path, monkeypatch, capsys, large, suffix):
    words = ["upscale", "--device", "cpu", "--scale", "3", noise(tmp_path)]
    assert main([*words, str(tmp_path / f"whole{suffix}")]) == 0
    assert not list(tmp_path.glob(".*"))
    with monkeypatch.context() as patch:
        drawn = counting(patch, Drawing, "pixels", stop_at=3)
        assert main([*words, str(tmp_path / f"out{suffix}")]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert len(drawn) == 3 and "finished tiles are kept in" in said and "run the same command again to continue" in said
    assert [file.name for file in tmp_path.glob(".*")] == [f".out{suffix}.parts"]
    with monkeypatch.context() as patch:
        rest = counting(patch, Drawing, "pixels")
        assert main([*words, str(tmp_path / f"out{suffix}")]) == 0
    assert len(rest) == 2 * 3 - 3
    assert not list(tmp_path.glob(".*"))
    made, whole = (np.asarray(Image.open(tmp_path / f"{name}{suffix}")) for name in ("out", "whole"))
    assert np.array_equal(made, whole)


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
def test_a_stopped_diffusion_goes_on_tile_by_tile(tmp_path, monkeypatch, capsys, large, sr_bundle, sampler):
    words = ["upscale", "--model", sr_bundle, "--device", "cpu", "--size", "60x70", "--tile", "16", "--steps", "3"]
    words += ["--sampler", sampler, "--eta", "0.5" if sampler == "ddim" else "0", noise(tmp_path, 16, 20)]
    with monkeypatch.context() as patch:
        all_of_it = counting(patch, LatentZoom, "_predict")
        encoded = counting(patch, LatentZoom, "encode")
        assert main([*words, str(tmp_path / "whole.png")]) == 0
    num, num_encoded = len(all_of_it), len(encoded)
    assert num == 6
    with monkeypatch.context() as patch:
        counting(patch, LatentZoom, "_predict", stop_at=num - 2)
        assert main([*words, str(tmp_path / "out.png")]) == 130
    with monkeypatch.context() as patch:
        rest, again = counting(patch, LatentZoom, "_predict"), counting(patch, LatentZoom, "encode")
        assert main([*words, str(tmp_path / "out.png")]) == 0
    assert len(rest) == 2 and not again and num_encoded > 1
    made, whole = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("out", "whole"))
    assert np.array_equal(made, whole) and not list(tmp_path.glob(".*"))


def test_pieces_of_other_work_are_not_taken(tmp_path, monkeypatch, large):
    words = ["upscale", "--device", "cpu", noise(tmp_path), str(tmp_path / "out.png")]
    with monkeypatch.context() as patch:
        counting(patch, Drawing, "pixels", stop_at=3)
        assert main([*words, "--size", "120x156"]) == 130
    with monkeypatch.context() as patch:
        drawn = counting(patch, Drawing, "pixels")
        assert main([*words, "--size", "120x156", "--look", "sharp"]) == 0
    assert len(drawn) == 6 and not list(tmp_path.glob(".*"))


def test_a_small_picture_says_that_nothing_is_kept(tmp_path, monkeypatch, capsys):
    counting(monkeypatch, Drawing, "pixels", stop_at=0)
    assert main(["upscale", "--device", "cpu", "--scale", "2", noise(tmp_path), str(tmp_path / "out.png")]) == 130
    said = capsys.readouterr().err
    assert "nothing of this picture was kept, so the same command starts it again" in said
    assert "to continue" not in said and sorted(f.name for f in tmp_path.iterdir()) == ["in.png"]


def test_a_damaged_piece_is_made_again_and_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    first = KeptPieces(tmp_path / "parts", {"a": "1"})
    assert torch.equal(first("x", lambda: torch.ones(3)), torch.ones(3))
    file = tmp_path / "parts" / "x.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    again = KeptPieces(tmp_path / "parts", {"a": "1"})
    assert torch.equal(again("x", lambda: torch.zeros(3)), torch.zeros(3)) and again.num_found == 0
    (tmp_path / "file").write_text("")
    nowhere = KeptPieces(tmp_path / "file" / "parts", {"a": "1"})
    assert torch.equal(nowhere("x", lambda: torch.ones(2)), torch.ones(2)) and nowhere.num_made == 0


def test_progress_shows_itself_at_once_and_while_a_unit_takes_long():
    class Stream:
        def __init__(self):
            self.lines, self.seen = [], threading.Event()

        def write(self, text):
            self.lines.append(text)
            if len(self.lines) >= 3:
                self.seen.set()

        def flush(self):
            pass

        def isatty(self):
            return True

    stream = Stream()
    with Progress("draw", 7, "pixels", stream=stream, is_ticking=True):
        assert "draw  0/7 (0%)  for 0s" in stream.lines[0]
        assert stream.seen.wait(30)  # nothing was counted meanwhile
    assert not [thread for thread in threading.enumerate() if thread.name == "latentzoom-progress"]
