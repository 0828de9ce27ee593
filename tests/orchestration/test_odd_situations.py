"""Pipes, names, streams, links, signals: what is odd about where a command runs costs neither work nor files."""

import io
import os
import signal
import sys
import threading

import fsspec
import numpy as np
import pytest
from PIL import Image
from test_stopped_picture import counting, large, noise  # noqa: F401
from tiny_bundle import make_bundle

from orchestration.cli import main
from orchestration.pictures import generating
from pipeline import canvas
from pipeline.drawing import Drawing
from pipeline.model import LatentZoom


def photo(folder, name, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((12, 9), Image.Resampling.BICUBIC).save(folder / name, "PNG")
    return folder / name


def upscale(*words):
    return main(["upscale", "--device", "cpu", *map(str, words)])


# --- pipes ------------------------------------------------------------------------------------------------------------


def test_a_pipe_is_read_once_also_where_something_is_replaced(tmp_path, monkeypatch, capsys):
    for seed, more in ((1, []), (2, ["--overwrite"])):
        data = photo(tmp_path, "in", seed).read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert upscale("-", "-o", tmp_path / "out.png", "--scale", 1, *more) == 0, capsys.readouterr().err
    assert upscale(tmp_path / "in", tmp_path / "same.png", "--scale", 1) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(Image.open(tmp_path / "same.png")))


@pytest.mark.parametrize("target", ["out/", "out.png"])
def test_a_named_pipe_without_suffix(tmp_path, target):
    data = photo(tmp_path, "in").read_bytes()
    for more in ([], ["--overwrite", "--quality", 90]):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        thread = threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True)
        thread.start()
        assert upscale(pipe, "-o", f"{tmp_path}/{target}", "--scale", 1 + len(more), *more) == 0
        thread.join()
        pipe.unlink()
    made = tmp_path / ("out/pipe.png" if target == "out/" else target)
    assert Image.open(made).size == (48, 36)


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_of_every_kind_keep_theirs(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    names = ["what?.png", "a#b.png", "100%.png", "ü ñ.png", "two\nlines.png", "n" * 251 + ".png", "é" * 125 + ".png"]
    for name in names:
        photo(tmp_path / "in", name)
    assert upscale(tmp_path / "in", tmp_path / "all", "--scale", 1) == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(names)
    assert upscale(tmp_path / "in" / "what?.png", tmp_path / "in" / "a#b.png", f"{tmp_path}/two/", "--scale", 1) == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["a#b.png", "what?.png"]


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", b"\xff\xc3\xa8.png"), ("ascii", rb"\udcff\xe8.png")])
def test_names_that_the_terminal_cannot_show_end_no_work(tmp_path, monkeypatch, encoding, shown):
    source = photo(tmp_path, os.fsdecode(b"\xff.png"))
    target = tmp_path / os.fsdecode("\udcffè.png")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert upscale(source, target, "--scale", 1) == 0
        assert shown in sys.stdout.buffer.getvalue()
    assert target.exists()


def test_a_link_that_leads_nowhere_is_said(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    photo(tmp_path / "in", "a.png")
    (tmp_path / "in" / "b.png").symlink_to("nowhere")
    assert upscale(tmp_path / "in", tmp_path / "out", "--scale", 1) == 1
    said = capsys.readouterr().err
    assert "cannot read" in said and "b.png" in said and "1 of 2 pictures could not be upscaled" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


# --- streams ----------------------------------------------------------------------------------------------------------


class Full(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_closed_standard_error_and_a_full_log_cost_no_picture(tmp_path, monkeypatch):
    for name, stream in (("a", None), ("b", io.TextIOWrapper(Full(), write_through=True))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            assert upscale(photo(tmp_path, "in.png"), tmp_path / f"{name}.png", "--scale", 1) == 0
        assert (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize("is_buffered", [True, False])
def test_a_full_standard_output_is_one_line(tmp_path, monkeypatch, capsys, is_buffered):
    raw = io.BufferedWriter(Full()) if is_buffered else Full()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=not is_buffered))
        assert upscale(photo(tmp_path, "in.png"), tmp_path / "out.png", "--scale", 1) == 2
        patch.setattr(raw if is_buffered else sys.stdout, "close", lambda: None, raising=False)
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("No space left on device")


# --- files that were there --------------------------------------------------------------------------------------------


def test_a_preview_never_replaces_a_picture(tmp_path, monkeypatch, capsys):
    bundle = make_bundle(tmp_path / "bundle", task="sr")
    mine = photo(tmp_path, "out.preview.png").read_bytes()
    words = ["--model", bundle, "--scale", 2, "--steps", 3, "--preview", 1, photo(tmp_path, "in.png")]
    assert upscale(*words, tmp_path / "out.png") == 2
    assert "out.preview.png is there already, where the preview would go" in capsys.readouterr().err
    assert (tmp_path / "out.preview.png").read_bytes() == mine and not (tmp_path / "out.png").exists()
    kept = tmp_path / "other.preview.png"
    with monkeypatch.context() as patch:  # a run that was killed
        patch.setattr(type(kept), "unlink", lambda *_, **__: None)
        assert upscale(*words, tmp_path / "other.png") == 0
    assert kept.exists()
    assert upscale(*words, tmp_path / "other.png", "--overwrite", "--seed", 1) == 0 and not kept.exists()


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_ended_leaves_nothing_half_written_and_says_what_is_kept(tmp_path, monkeypatch, capsys, large, number):  # noqa: F811
    draw = Drawing.pixels
    words = [noise(tmp_path), tmp_path / "out.png", "--scale", 3]
    cases = [
        (0, "nothing of this picture was kept", ["in.png"]),
        (1, "1 finished tiles are kept in", [".out.png.parts"]),
    ]
    for num_drawn, words_said, files in cases:
        calls: list[object] = []

        def pixels(self, window, calls=calls, num_drawn=num_drawn):
            calls.append(window)
            if len(calls) > num_drawn:
                os.kill(os.getpid(), number)
                raise AssertionError("not reached")
            return draw(self, window)

        with monkeypatch.context() as patch:
            patch.setattr(Drawing, "pixels", pixels)
            assert upscale(*words) == 130
        assert words_said in capsys.readouterr().err
        assert sorted({path.name for path in tmp_path.iterdir()} | {"in.png"}) == sorted({*files, "in.png"})
        assert signal.getsignal(number) is signal.SIG_DFL
    assert upscale(noise(tmp_path), tmp_path / "out.png", "--scale", 1) == 0


def test_pieces_of_a_large_picture_go_with_a_small_one_in_its_place(tmp_path, monkeypatch, large):  # noqa: F811
    counting(monkeypatch, Drawing, "pixels", stop_at=1)
    assert upscale(noise(tmp_path), tmp_path / "out.png", "--scale", 3) == 130
    assert (tmp_path / ".out.png.parts").is_dir()
    monkeypatch.undo()
    assert upscale(noise(tmp_path), tmp_path / "out.png", "--scale", 1) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"]


def test_a_persons_folder_is_never_taken_for_pieces(tmp_path, large):  # noqa: F811
    mine = tmp_path / ".out.png.parts"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    assert upscale(noise(tmp_path), tmp_path / "out.png", "--scale", 3) == 0
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]


def test_a_stopped_picture_that_goes_to_a_url_continues(tmp_path, monkeypatch, capsys, large):  # noqa: F811
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path / "cache"))
    words = [noise(tmp_path), "memory://stopped/out.png", "--scale", 3]
    with monkeypatch.context() as patch:
        counting(patch, Drawing, "pixels", stop_at=2)
        assert upscale(*words) == 130
    assert f"finished tiles are kept in {tmp_path / 'cache'}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        rest = counting(patch, Drawing, "pixels")
        assert upscale(*words) == 0
    assert len(rest) == 6 - 2 and not list((tmp_path / "cache" / "parts").iterdir())
    fs = fsspec.filesystem("memory")
    assert Image.open(io.BytesIO(fs.cat_file("/stopped/out.png"))).size == (156, 120)
    fs.rm("/stopped", recursive=True)


def test_a_stopped_generation_says_what_is_true(tmp_path, monkeypatch, capsys):
    bundle = make_bundle(tmp_path / "bundle")
    words = ["generate", "--model", bundle, "--device", "cpu", "--steps", "2", "--size", "24", "--batch", "2"]
    nothing = "no picture was finished, so the same command starts again"
    some = "3 of 4 pictures are there; the same command continues with the others"
    for num, stop_at, words_said in ((1, 0, nothing), (4, 3, some)):
        with monkeypatch.context() as patch:
            counting(patch, Drawing, "pixels", stop_at=stop_at)
            assert main([*words, "--num", str(num), "--out", str(tmp_path / str(num))]) == 130
        assert words_said in capsys.readouterr().err


def test_a_stopped_large_generation_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generating, "LARGE", 1)
    monkeypatch.setattr(canvas, "WINDOW", 16)
    bundle = make_bundle(tmp_path / "bundle")
    words = ["generate", "--model", bundle, "--device", "cpu", "--steps", "2", "--size", "48", "--num", "2"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        counting(patch, Drawing, "pixels", stop_at=12)
        assert main([*words, "--out", str(tmp_path / "out")]) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        sampled, drawn = counting(patch, LatentZoom, "sample_latents"), counting(patch, Drawing, "pixels")
        assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert not sampled and len(drawn) == 18 - 12
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"seed-00000{seed}-48x48.png" for seed in (0, 1)]
    for name in names:
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / folder / name)) for folder in ("whole", "out")))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "-3"], "--steps -3 is not allowed; use 0 or more"),
        (["--eta", "nan"], "--eta nan is not allowed; use 0 to 1"),
        (["--format", "gif"], "'gif' is none of png, jpg, webp, avif, tif"),
        (["--dtype", "fp16"], "'fp16' is none of float32, bfloat16, float16"),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, words, said):
    try:
        status = upscale(photo(tmp_path, "in.png"), tmp_path / "out.png", "--scale", 2, *words)
    except SystemExit as error:
        status = error.code
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert status == 2 and said in text and not (tmp_path / "out.png").exists()
