"""`latentzoom bench`: figures that can be right, kept as JSON, compared."""

import dataclasses
import json

import pytest

from orchestration import bench_cli, bench_decode
from orchestration.bench import Options, Results, Row, compare, load_results
from orchestration.cli import main

FACTS = {"device": "d", "cores": 2, "threads": 2, "dtype": "float32", "busy": 0.1}


def results(**changes):
    row = Row(part="decode", name="liif 512²", rate=10.0, unit="Mpixel/s", ratio=3.0, memory_mb=100.0)
    return Results(FACTS, (dataclasses.replace(row, **changes),))


def test_decode_is_measured_kept_and_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_decode, "BAND_PIXELS", 512)
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    arguments = ["bench", "--only", "decode", "--quick", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--json", str(first)]) == 0
    out = capsys.readouterr().out
    assert "straightforward 512²" in out and "1.00x" in out
    rows = {row.name: row for row in load_results(first).rows}
    assert rows["light 512²"].ratio > 0 and rows["liif 512²"].ratio > 0 and rows["liif 512²"].share_of_peak > 0
    assert rows["liif 512²"].max_difference < 1e-5 and abs(rows["liif 512²"].psnr_change) < 0.05
    data = json.loads(first.read_text())
    for row in data["rows"]:
        row["rate"] *= 2
    second.write_text(json.dumps(data))
    assert main(["bench", "--compare", str(second), str(first)]) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert main(["bench", "--compare", str(first), str(second)]) == 0


@pytest.mark.parametrize(
    ("change", "num_worse"),
    [
        ({"rate": 9.1}, 0),
        ({"rate": 8.9}, 1),
        ({"ratio": 2.6}, 1),
        ({"memory_mb": 112.0}, 0),
        ({"memory_mb": 120.0}, 1),
        ({"rate": 20.0}, 0),
    ],
)
def test_more_than_ten_percent_is_flagged(change, num_worse):
    assert compare(results(), results(**change))[1] == num_worse


def test_other_machines_compare_by_ratio_only():
    other = Results({**FACTS, "device": "e"}, results(rate=1.0).rows)
    assert compare(results(), other)[1] == 0
    assert compare(results(), Results(other.machine, results(ratio=1.0).rows))[1] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "speed"], "no part speed"),
        (["--compare", "missing.json"], "cannot read missing.json"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_parts_exist():
    for module, function in bench_cli.PARTS.values():
        assert callable(getattr(__import__(module, fromlist=[function]), function))
    assert Options().device == "cpu"
