"""A run that goes on: its newest bundle is drawn from, evaluated, registered; its early figures are evaluate's."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from direct_settings import DIRECT
from stage_inputs import Shop, make_shop

from orchestration import registry, tracking
from orchestration.evaluation.early import make_quality
from orchestration.evaluation.evaluate import evaluate
from orchestration.evaluation.spec import EvaluationSpec
from orchestration.mlflow_reporter import MlflowReporter
from orchestration.stage_run import stage_run
from pipeline.bundle import UNFINISHED, load_bundle, save_bundle
from pipeline.errors import Stopped, UserError
from training.config import override
from training.presets import debug
from training.run import train
from training.stopping import Stop


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    torch.set_num_threads(1)
    return make_shop(tmp_path_factory.mktemp("shop"), debug(), num=24, held_out=0.5)


SETTINGS = ["align.steps=6", "align.bundle_every=1", "align.validate_every=1", "align.quality_every=3"]
SETTINGS += ["align.quality_samples=6", "align.best_by=quality/kid_random_vgg_x32"]
SPEC = EvaluationSpec(task="generation", sizes=(32,), num=6, num_steps=20)


def run(shop, run_dir, **options):
    preset = override(debug(), SETTINGS)
    places = {"data": shop.data, "run_dir": str(run_dir), "bundle": shop.bundle, "device": "cpu"}
    return train("align", preset, make_quality=make_quality, **places, **options)


def test_a_bundle_of_a_run_that_goes_on_is_used_like_any_other(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(Stopped):
        run(shop, tmp_path / "run", stop_requested=lambda: Stop.LEAVE)
    newest = str(tmp_path / "run/bundle")
    assert load_bundle(newest).meta[UNFINISHED] == {"step": 1, "of": 6}
    folder = registry.resolve(newest)
    digest = registry.bundle_digest(folder)
    assert folder.is_relative_to(tmp_path / "cache")  # what is being used stays as it is

    later = load_bundle(newest)
    with torch.no_grad():
        next(later.denoiser.parameters()).add_(1.0)
    save_bundle(newest, later)  # as the run does at its next step
    assert registry.bundle_digest(folder) == digest != registry.bundle_digest(newest)
    assert registry.load(str(folder)).generate(num=1, size=(20, 24), seed=0, num_steps=2)[0].size == (24, 20)

    report, _ = evaluate(newest, shop.data, EvaluationSpec(task="reconstruction", num=4), progress=False)
    assert report.bundle_digest == registry.bundle_digest(newest)
    version = registry.register(newest, "early", tracking_uri=uri)
    assert version.tags["latentzoom.bundle_digest"] == report.bundle_digest

    result = run(shop, tmp_path / "run")
    assert result.resumed_from == 1 and result.steps == 6
    assert registry.resolve(result.bundle) == Path(result.bundle)  # final: where it lies


def test_early_figures_are_those_of_evaluate_and_have_the_steps_of_the_training_curves(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTZOOM_CACHE", str(tmp_path / "cache"))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_dir = tmp_path / "run"
    places = {"data": shop.data, "run_dir": str(run_dir)}
    with stage_run(uri, "align", override(debug(), SETTINGS), **places) as spec:
        result = run(shop, run_dir, reporters=[lambda: MlflowReporter(**spec, system_metrics=False)])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    early = {row["step"]: row["quality/kid_random_vgg_x32"] for row in rows if "quality/kid_random_vgg_x32" in row}
    assert list(early) == [3, 6]

    report, _ = evaluate(result.bundle, shop.data, SPEC, progress=False)
    (figure,) = [f for f in report.figures if f.name == "kid_random_vgg"]
    assert early[6] == pytest.approx(figure.value, rel=1e-4)
    best = load_bundle(str(run_dir / "bundle-best")).meta["best"]
    least = min(early, key=early.get)
    assert best == {"figure": "quality/kid_random_vgg_x32", "step": least, "value": early[least]}

    client = tracking.client(uri)
    for name, steps in (("val/loss_level8", [1, 2, 3, 4, 5, 6]), ("quality/kid_random_vgg_x32", [3, 6])):
        history = client.get_metric_history(spec["run_id"], name)
        assert [(point.step, point.value) for point in history] == [
            (row["step"], pytest.approx(row[name])) for row in rows if row["step"] in steps
        ]


def test_direct_super_resolution_is_validated_and_judged_by_its_enlargements(shop, tmp_path):
    settings = ["steps=2", "validate_every=2", "validate_samples=3", "quality_every=2", "quality_samples=2"]
    preset = override(debug(), [*DIRECT, *(f"decoder.{setting}" for setting in settings)])
    run_dir = tmp_path / "run"
    result = train(
        "decoder", preset, data=shop.pixels, run_dir=str(run_dir), device="cpu", make_quality=make_quality
    )  # fmt: skip
    told = {k: v for k, v in result.metrics.items() if k.startswith(("val/", "quality/"))}
    assert {name for name in told if "lpips" not in name} == {
        "val/l1", "val/psnr_scale2", "val/psnr_scale3", "val/psnr_scale4",
        "quality/psnr_x2", "quality/psnr_x4", "quality/ssim_x2", "quality/ssim_x4",
    }  # fmt: skip
    spec = EvaluationSpec(task="sr", scales=(2.0, 4.0), num=2, sr_mode="fixed-truth")
    report, _ = evaluate(result.bundle, shop.pixels, spec, progress=False)
    (figure,) = [f for f in report.figures if (f.name, f.method, f.setting) == ("psnr_rgb", "ours", "x4")]
    assert told["quality/psnr_x4"] == pytest.approx(figure.value, abs=1e-3)


def test_a_figure_of_quality_that_there_is_not_is_refused_before_training(shop, tmp_path):
    def refused(stage, *settings, quality=make_quality):
        preset = override(debug(), [f"{stage}.{setting}" for setting in ("quality_every=2", *settings)])
        with pytest.raises(UserError) as caught:
            run_dir = str(tmp_path / "run")
            train(
                stage, preset, data=shop.data, run_dir=run_dir, bundle=shop.bundle, device="cpu", make_quality=quality
            )
        assert (tmp_path / "run/metrics.jsonl").read_text() == ""
        return str(caught.value)

    said = refused("align", "best_by=quality/kid_x32")  # without Inception
    assert "is no figure of this stage; use one of val/loss, " in said and "quality/kid_random_vgg_x32" in said
    said = refused("align", "quality_inception=/nowhere/inception.pth")
    assert said == "align.quality_inception: no such file: /nowhere/inception.pth"
    said = refused("decoder", "best_by=quality/psnr_x4")
    assert "no evaluation fits what there is at this stage; choose one of `val/...`" in said
    said = refused("align", "best_by=quality/kid_random_vgg_x32", quality=None)
    assert "they come with `latentzoom train`" in said


def test_one_held_out_picture_is_no_distribution(shop, tmp_path):
    found = []

    def look(context):
        alone = dataclasses.replace(context.manifest, splits={"train": 1, "val": 1})
        found.extend(make_quality(dataclasses.replace(context, manifest=given)) for given in (context.manifest, alone))

    preset = override(debug(), ["align.steps=0", "align.quality_every=1"])
    places = {"data": shop.data, "run_dir": str(tmp_path / "run"), "bundle": shop.bundle}
    train("align", preset, make_quality=look, device="cpu", **places)
    assert found[0] is not None and found[1] is None
