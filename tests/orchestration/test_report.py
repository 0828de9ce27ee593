"""The report as people read it: ours beside the published rows that belong there, plots of every figure over size."""

import dataclasses
import io
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from pipeline.errors import UserError
from training.evaluation.report import Figure, Report
from training.evaluation.report_page import markdown, page, tables
from training.evaluation.report_pictures import _lines, plots


def figure(name, setting, value=0.5, method="ours"):
    return Figure(
        name=name, method=method, setting=setting, value=value, low=value - 0.1, high=value + 0.1, protocol="p", num=4
    )


def report(task, figures, **changes):
    base = {
        "task": task, "model": "m", "model_name": "m", "bundle_digest": "b", "encoder_identity": "e", "data": "/d",
        "data_digest": "d", "split": "val", "num": 4, "seed": 0, "sampler": "s",
    }  # fmt: skip
    return Report(**{**base, **changes}, figures=tuple(figures))


@pytest.mark.parametrize(
    ("dataset", "sr_mode", "lr_size", "setting", "name", "row"),
    [
        ("celebahq", "fixed-input", 16, "x5.3", "psnr_rgb", ["paper (published)", "24.66"]),
        ("lsun-bedroom", "fixed-input", 16, "x16", "lpips", ["paper (published)", "0.3269"]),
        ("lsun-tower", "fixed-input", 16, "x16", "lpips", ["paper (published)", "0.1897"]),
        ("div2k", "fixed-truth", 48, "x8", "psnr_div2k", ["paper (published)", "23.82"]),
    ],
)
def test_published_rows_stand_beside_ours(dataset, sr_mode, lr_size, setting, name, row):
    made = report("sr", [figure(name, setting)], sr_mode=sr_mode, lr_size=lr_size, dataset=dataset)
    (_, (_, rows)), *_ = tables(made)
    assert rows[0][0] == "**ours**" and row in rows and "Published: Kim & Kim" in markdown(made)


@pytest.mark.parametrize(("sr_mode", "lr_size"), [("fixed-truth", 16), ("fixed-input", 48)])
def test_rows_of_another_protocol_or_input_size_stay_away(sr_mode, lr_size):
    made = report("sr", [figure("psnr_rgb", "x5.3")], sr_mode=sr_mode, lr_size=lr_size, dataset="celebahq")
    assert len(tables(made)[0][1][1]) == 1 and "Published" not in page(made)


@pytest.mark.parametrize(("dataset", "is_published"), [("lsun-bedroom", True), ("celebahq", False), ("", False)])
def test_rows_of_another_data_set_stay_away(dataset, is_published):
    """Bedrooms stand beside bedrooms, not beside faces, nor beside what nobody knows."""
    figures = [figure("fid", "128x128"), figure("fid", "160x160"), figure("selfssim", "128x128-160x160")]
    made = report("generation", figures, dataset=dataset)
    assert ("Published" in markdown(made)) is is_published
    assert any("MSPIE" in row[0] for row in dict(tables(made))["Figures"][1]) is is_published
    selfssim = dict(tables(made))["SelfSSIM: one latent at two sizes"][1]
    assert any("(published" in row[0] for row in selfssim) is is_published
    for task, mode, setting in (("sr", "fixed-input", "x5.3"), ("sr", "fixed-truth", "x8")):
        made = report(task, [figure("psnr_rgb", setting)], sr_mode=mode, lr_size=16)
        assert "Published" not in page(made)


def test_speed_has_the_published_columns_where_the_same_was_measured():
    figures = [figure("fps", "x8", 20.0), figure("fps", "x9", 19.0)]
    theirs = {"dataset": "celebahq", "sr_mode": "fixed-input", "lr_size": 16}
    header, rows = dict(tables(report("sr", figures, **theirs)))["Speed"]
    assert header[3:] == ["IDM (published)", "paper (published)"]
    assert [row[3:] for row in rows] == [["0.0202", "0.2568"], ["–", "–"]]
    for other in ({"dataset": ""}, {"lr_size": 32}, {"sr_mode": "fixed-truth"}):
        made = report("sr", figures, **(theirs | other))
        assert "ublished" not in " ".join(dict(tables(made))["Speed"][0]) and "Published" not in page(made)


def test_selfssim_is_drawn_against_every_size():
    pairs = [figure("selfssim", s, v) for s, v in (("16x16-24x24", 0.9), ("16x16-32x32", 0.8), ("24x24-32x32", 0.95))]
    lines = {label: [(x, f.value) for x, f in points] for label, points in _lines(pairs).items()}
    assert lines["against 16x16"] == [(24.0, 0.9), (32.0, 0.8)]
    assert lines["against 24x24"] == [(16.0, 0.9), (32.0, 0.95)] and len(lines) == 3
    made = plots(report("generation", pairs))
    assert Image.open(io.BytesIO(made["plot-selfssim.png"])).width > 300


def test_a_folder_has_no_split_and_pairs_are_explained():
    made = report("sr", [figure("psnr_rgb", "x4")], split="", sr_mode="fixed-truth")
    assert "(split" not in page(made) and "shrunk by the scale" in page(made)


@pytest.mark.parametrize("data", [{}, [], {"figures": [{"name": "x"}]}, {"figures": 3}])
def test_something_else_is_no_report(data):
    with pytest.raises(UserError, match="not a report of latentzoom evaluate"):
        Report.from_dict(data)


def test_the_page_shows_names_as_they_are_and_runs_nothing():
    """Models, notes and files may be called anything."""
    odd = "<script>alert('1')</script> & {{ 7 * 7 }}"
    ours, bicubic = figure("psnr_rgb", "x4", 30.0), figure("psnr_rgb", "x4", 28.0, "bicubic")
    made = dataclasses.replace(report("sr", [ours, bicubic]), model_name=odd, notes=(odd,))
    shown = page(made, ["strip's.png"])
    assert "<script>" not in shown and shown.count("{{ 7 * 7 }}") == 3 and "49" not in shown
    root = ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>|<img[^>]*>", "", shown))
    assert root.findtext("h1") == f"{odd}: sr" and root.findtext(".//p[@class='note']") == odd
    rows = [[cell.text for cell in row.findall("td")] for row in root.findall(".//tr[td]")]
    assert rows == [["ours", rows[0][1]], ["bicubic", "28.00"]] and rows[0][1].startswith("30.00")
    assert root.find(".//tr[@class='ours']") is not None and "strip&#39;s.png" in shown
