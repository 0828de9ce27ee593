"""`latentzoom plan`: the arithmetic that is shown is the arithmetic that is done."""

from __future__ import annotations

import pytest

from orchestration.cli import main
from orchestration.sizing import DataSet, Rates, encoder_flops, sample_bytes, size_up
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.presets import get_preset


def rows(data=None, gpus=1, **rates):
    data = data or DataSet(name="own", preset="debug", images=1000, source_bytes=1e9, crops=2)
    found = size_up(data, get_preset("debug"), Rates(**rates), gpus=gpus, evaluated=100, steps=10)
    return {row.what: row for row in found}


def test_totals_are_the_sums_of_their_rows():
    found = rows(gpu_hour=2.0, cpu_hour=0.5, gb_month=0.1, months=4.0)
    values = found.values()
    gpu = sum(r.value for r in values if r.unit == "GPU h")
    stored = sum(r.value for r in values if r.unit == "GB")
    assert found["GPU hours"].value == pytest.approx(gpu) and gpu > 0
    assert found["cost: storage"].value == pytest.approx(stored * 0.1 * 4)
    cores = sum(r.value for r in values if r.unit == "core h")
    assert found["cost"].value == pytest.approx(2.0 * gpu + 0.5 * cores + stored * 0.4)


def test_more_data_costs_preprocessing_not_steps_and_a_faster_gpu_saves_in_proportion():
    small = rows()
    large = rows(DataSet(name="own", preset="debug", images=10_000, source_bytes=1e10, crops=2))
    assert large["encode"].value == pytest.approx(10 * small["encode"].value)
    assert large["shards"].value == pytest.approx(10 * small["shards"].value)
    assert large["denoiser"].value == small["denoiser"].value
    assert rows(mfu=0.6)["align"].value == pytest.approx(rows(mfu=0.3)["align"].value / 2)


def test_the_bytes_of_a_sample_are_those_that_preprocessing_writes(shop):
    """The PNG ratio is data; all else is counted."""
    model = get_preset("debug").model
    one, two = (sample_bytes(model, ratio)[0] for ratio in (0.5, 0.6))
    assert two - one == pytest.approx(0.1 * 3 * model.image_size**2)
    assert shop.bytes / shop.num == pytest.approx(sample_bytes(model, shop.png_ratio)[0], rel=0.25)


@pytest.fixture
def shop(tmp_path):
    """A real shard set of the debug preset: its bytes, and what its PNGs came to."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    from pipeline.bundle import Bundle, build_autoencoder, save_bundle

    model = get_preset("debug").model
    save_bundle(str(tmp_path / "bundle"), Bundle(model, build_autoencoder(model)))
    (tmp_path / "in").mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    config = PreprocessConfig(
        source_url=str(tmp_path / "in"), dest=str(tmp_path / "out"), size=32, autoencoder=str(tmp_path / "bundle"),
        encode_threads=1,
    )  # fmt: skip
    summary = preprocess(config)
    content = b"".join(p.read_bytes() for p in sorted((tmp_path / "out").glob("*.tar")))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        pngs = [m.size for m in tar if m.name.endswith(".png")]
    ratio = sum(pngs) / len(pngs) / (3 * 32 * 32)
    return type("Shop", (), {"bytes": len(content), "num": summary.num_samples, "png_ratio": ratio})


def test_encoding_cost_grows_with_area():
    import dataclasses

    model = get_preset("debug").model
    double = dataclasses.replace(model, image_size=2 * model.image_size)
    assert encoder_flops(double) == pytest.approx(4 * encoder_flops(model), rel=0.01)


def test_the_command_shows_its_arithmetic_and_refuses_nonsense(capsys):
    assert main(["plan", "mine", "--preset", "debug", "--images", "500", "--times", "1000", "--gpus", "4"]) == 0
    text = capsys.readouterr().out
    assert "500,000 images × 1 crops" in text and "assumed: " in text and "TFLOP/s" in text
    assert main(["plan", "mine"]) == 2
    assert main(["plan", "mine", "--preset", "debug", "--images", "5", "--gpus", "0"]) == 2
    assert main(["plan", "mine", "--preset", "debug", "--images", "5", "--gpus", "1", "--mfu", "0"]) == 2
    assert capsys.readouterr().err.count("latentzoom: error: ") == 3
