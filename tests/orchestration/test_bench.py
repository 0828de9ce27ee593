"""`latentzoom bench`: figures that can be right, kept as JSON, compared."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import orchestration.bench
import orchestration.bench.checkpoint
import orchestration.bench.loader
import orchestration.bench.memory
import orchestration.bench.training
import orchestration.bench.workers
from orchestration.bench import decode as bench_decode
from orchestration.bench import sampling as bench_sampling
from orchestration.bench.measure import macs_of, quality
from orchestration.bench.table import Options, Results, Row, compare, load_results
from orchestration.cli import main
from orchestration.verbs import bench as bench_cli
from training.presets import debug

FACTS = {"device": "d", "cores": 2, "threads": 2, "dtype": "float32", "busy": 0.1}


def results(**changes):
    row = Row(part="decode", name="liif 512²", rate=10.0, unit="Mpixel/s", ratio=3.0, memory_mb=100.0)
    return Results(FACTS, (dataclasses.replace(row, **changes),))


def test_decode_is_measured_kept_and_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_decode, "BAND_PIXELS", 512)
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    arguments = ["bench", "--only", "decode", "--quick", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--out", str(first)]) == 0
    out = capsys.readouterr().out
    assert "straightforward 512²" in out and "1.00x" in out and "GMAC/s" in out
    rows = {row.name: row for row in load_results(first).rows}
    assert rows["light 512²"].ratio > 0 and rows["liif 512²"].ratio > 0 and rows["liif 512²"].share_of_peak > 0
    for name in ("liif 512²", "light 512²"):
        assert rows[name].max_difference < 1e-5 and abs(rows[name].psnr_change) < 0.05
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


def test_what_no_longer_runs_is_a_regression():
    lines, num_worse = compare(results(), results(rate=None, note="does not run: too large"))
    assert num_worse == 1 and "does not run: too large" in lines[0]


def test_other_machines_compare_by_ratio_only():
    other = Results({**FACTS, "device": "e"}, results(rate=1.0).rows)
    assert compare(results(), other)[1] == 0
    assert compare(results(), Results(other.machine, results(ratio=1.0).rows))[1] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "speed"], "no part speed"),
        (["--compare", "missing.json"], "cannot read missing.json"),
        (["--threads", "0"], "use 1 to"),
        (["--device", "tpu"], "--device tpu is not allowed; use cpu, cuda or cuda:1"),
        (["--device", "meta"], "--device meta is not allowed"),
        (["--only", "kernel", "--json", "."], "it is a folder"),
        (["--only", "kernel", "--out", "old.json"], "old.json is there already; give another name, or replace it"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("kept")
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err and (tmp_path / "old.json").read_text() == "kept"


QUICK = ["--quick", "--width", "0.05", "--rounds", "1", "--threads", "1", "--device", "cpu"]


@pytest.mark.slow
def test_sampling_sr_and_stage_one_are_measured(tmp_path, capsys, monkeypatch):
    for name, value in (("IMAGE", 32), ("LOW", 4), ("STEPS", 2)):
        monkeypatch.setattr(bench_sampling, name, value)
    monkeypatch.setattr(orchestration.bench.training, "narrow_preset", lambda width, batch: debug())
    parts = ["sampling", "sr", "stage1", "kernel"]
    assert main(["bench", "--only", *parts, *QUICK, "--out", str(tmp_path / "a")]) == 0
    rows = {(row.part, row.name): row for row in load_results(tmp_path / "a").rows}
    assert {part for part, _ in rows} == set(parts)
    assert rows.pop(("kernel", "not run")).note == "needs a CUDA device and Triton"
    assert all(row.ratio > 0 and row.seconds > 0 and 0 < row.share_of_peak < 1 for row in rows.values())
    assert rows["sampling", "straightforward: ddim 200 steps"].ratio == 1.0
    assert rows["stage1", "straightforward step"].ratio == 1.0
    for row in (rows["sampling", "dpm++ 2 steps, batch 1"], rows["sr", "x8 (4² → 32²)"], rows["stage1", "ours step"]):
        assert 0 < row.max_difference < 1e-3
    assert abs(rows["sr", "x8 (4² → 32²)"].psnr_change) < 0.05


@pytest.mark.slow
def test_preprocessing_and_stage_two_are_measured(tmp_path, capsys):
    arguments = ["--quick", "--width", "0.125", "--rounds", "1", "--threads", "1", "--device", "cpu"]
    assert main(["bench", "--only", "preprocess", "stage2", *arguments, "--out", str(tmp_path / "a")]) == 0
    rows = {(row.part, row.name): row for row in load_results(tmp_path / "a").rows}
    for name in ("straightforward", "whole command", "encoder alone", "load latents", "load latents and pixels"):
        assert rows["preprocess", name].rate > 0
    assert 0 < rows["preprocess", "whole command"].share_of_peak < 1
    assert rows["stage2", "straightforward step"].ratio == 1.0 and rows["stage2", "straightforward step"].memory_mb > 0
    assert rows["stage2", "cached step"].ratio > 0


def measured(module, part, monkeypatch, **options):
    """The rows of a part by name, on the debug preset where it trains."""
    if hasattr(module, "narrow_preset"):
        monkeypatch.setattr(module, "narrow_preset", lambda width, batch: debug())
    rows = getattr(module, f"bench_{part}")(Options(threads=1, quick=True, rounds=2, **options), 1e11)
    assert {row.part for row in rows} == {part}
    return {row.name: row for row in rows}


def test_a_checkpoint_in_the_background_stands_beside_one_in_place(monkeypatch):
    waited = []
    monkeypatch.setattr(orchestration.bench.checkpoint, "wait_for", waited.append)
    rows = measured(orchestration.bench.checkpoint, "checkpoint", monkeypatch)
    assert len(waited) == 6  # of two rounds and the first: each step is done when its time is taken
    assert rows["straightforward"].ratio == 1.0 and rows["in the background"].ratio > 0
    assert rows["copy alone"].ratio > 0 and rows["step"].rate > 0 and rows["step beside the writing"].rate > 0
    assert "stands still" in rows["in the background"].note


@pytest.mark.slow
def test_training_says_how_long_it_waits_for_shards(monkeypatch):
    (row,) = measured(orchestration.bench.loader, "loader", monkeypatch).values()
    assert row.rate > 0 and 0 < row.ratio <= 1.0
    assert float(row.note.split()[1]) == pytest.approx(100 * (1 - row.ratio), abs=0.01)


@pytest.mark.slow
def test_a_process_that_preprocesses_many_samples_says_how_it_grows(monkeypatch):
    monkeypatch.setattr(orchestration.bench.memory, "apart", lambda function, num: function(min(num, 2_000)))
    rows = measured(orchestration.bench.memory, "memory", monkeypatch)
    assert rows["command without encoder"].rate > 0
    assert abs(rows["growth in 10 000 samples"].memory_mb) < 1000


def test_two_workers_stand_beside_one(monkeypatch):
    calls = []

    def launch(stage, preset, **options):
        calls.append((options["num_workers"], options["gpus_per_worker"]))
        return SimpleNamespace(metrics={"images_per_s": 3.0 + options["num_workers"]})

    monkeypatch.setattr("orchestration.cluster.ray_train.launch", launch)
    monkeypatch.setattr(orchestration.bench.workers, "make_shards", lambda folder, model: ("data", "bundle"))
    monkeypatch.setattr(orchestration.bench.workers, "_cores", lambda: 4)
    rows = measured(orchestration.bench.workers, "workers", monkeypatch)
    assert calls == [(1, 0.0), (2, 0.0)]
    assert rows["straightforward: one worker"].ratio == 1.0 and rows["two workers"].ratio == 1.25


@pytest.mark.parametrize(
    ("device", "cores", "has_ray", "note"),
    [
        ("cpu", 2, True, "needs 4 cores for two workers, Ray and the loader, here are 2"),
        ("cuda", 8, True, "needs two GPUs, here is 1"),
        ("cpu", 8, False, "needs Ray: pip install 'latentzoom[cluster]'"),
    ],
)
def test_what_this_machine_cannot_measure_is_said(monkeypatch, device, cores, has_ray, note):
    module = orchestration.bench.workers
    monkeypatch.setattr(module, "_cores", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if has_ray else None)
    (row,) = measured(module, "workers", monkeypatch, device=device).values()
    assert row == Row(part="workers", name="not run", note=note)


def test_costly_parts_are_measured_only_when_named(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench_cli, "run", lambda options, parts: asked.append(parts) or results())
    assert main(["bench"]) == 0 and main(["bench", "--only", "memory,workers"]) == 0
    assert set(bench_cli.PARTS) - set(asked[0]) == {"workers", "memory"} and asked[1] == ("memory", "workers")
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(part in text for part in bench_cli.PARTS) and "only when named, workers and memory" in text


def test_the_verb_is_the_only_way_in():
    files = Path(orchestration.bench.__file__).parent.glob("*.py")
    assert [file.name for file in files if "__main__" in file.read_text()] == []


def test_the_largest_picture_is_drawn_tile_by_tile_and_not_kept(monkeypatch):
    monkeypatch.setattr("pipeline.canvas.WINDOW", 32)
    monkeypatch.setattr(bench_decode, "CELLS", 8)
    drawn = []
    original = bench_decode.Drawing.pixels

    def pixels(self, window):
        drawn.append(original(self, window).shape[:2])
        return original(self, window)

    monkeypatch.setattr(bench_decode.Drawing, "pixels", pixels)
    row = bench_decode.tile_by_tile(Options(threads=1), peak=1e11, side=80)
    assert sum(height * width for height, width in drawn[1:]) == 80 * 80 and max(drawn) == (32, 32)
    assert row.name == "liif 80² tile by tile" and row.memory_mb is not None
    assert row.rate == pytest.approx(0.0064 / row.seconds) and 0 < row.share_of_peak < 1


def test_operations_are_counted_with_attention():
    query, weight = torch.randn(1, 2, 8, 4), torch.randn(6, 4)
    assert macs_of(lambda: torch.nn.functional.linear(query, weight)) == 2 * 8 * 4 * 6
    assert macs_of(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)) == 2 * 2 * 8 * 8 * 4


def test_quality_is_what_the_difference_does_to_a_picture():
    exact = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert quality(exact, exact) == (0.0, 0.0)
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
    difference, change = quality(exact, exact + noise * 2 * 10**-1.5)  # as far again: half the signal-to-noise ratio
    assert difference > 0.1 and change == pytest.approx(-3.0, abs=0.1)


def test_lost_quality_is_a_regression():
    assert compare(results(psnr_change=-0.001), results(psnr_change=-0.04))[1] == 0
    assert compare(results(psnr_change=-0.001), results(psnr_change=-0.06))[1] == 1


def test_parts_exist():
    for module, function in bench_cli.PARTS.values():
        assert callable(getattr(__import__(module, fromlist=[function]), function))
    assert Options().device == "cpu"
