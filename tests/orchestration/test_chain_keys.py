"""What makes a step of the chain stale, and what a stage's run may be continued with: only what decides its outcome."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_pictures import make_pictures

from orchestration.chain.job import Chain, Job
from pipeline.bundle import load_bundle
from pipeline.errors import UserError
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.config import override
from training.evaluation.spec import EvaluationSpec
from training.presets import debug
from training.run import train

DECODER, DENOISER = "model.decoder.kind=light", "model.schedule.num_steps=500"


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / "pictures", 8, cells=32, side=32)


def settings(pictures: Path, dest: Path) -> PreprocessConfig:
    return PreprocessConfig(source="folder", source_url=str(pictures), size=32, samples_per_shard=8, dest=str(dest))


def keys(pictures: Path, work: Path, *changes: str) -> dict[str, str]:
    job = Job(
        work=str(work),
        model_name="m",
        preset=override(debug(), list(changes)),
        preprocess=settings(pictures, work),
        evaluation=EvaluationSpec(task="generation", sizes=(32,)),
        tracking_uri="sqlite:///x.db",
        local=True,
    )
    return Chain(job).keys


@pytest.mark.parametrize(
    ("change", "first_changed"),
    [
        ("model.autoencoder.num_res_blocks=3", "autoencoder"),
        ("model.image_size=64", "autoencoder"),
        (DECODER, "decoder"),
        ("model.denoiser.num_res_blocks=3", "denoiser"),
        (DENOISER, "denoiser"),
        ("model.name=other", "denoiser"),
    ],
)
def test_a_change_of_the_model_makes_anew_what_it_decides(pictures, tmp_path, change, first_changed):
    before, after = keys(pictures, tmp_path), keys(pictures, tmp_path, change)
    names = list(before)
    changed = [name for name in names if before[name] != after[name]]
    assert changed == names[names.index(first_changed) :]


def test_settings_that_came_later_make_nothing_anew(pictures, tmp_path):
    """A pipeline that was begun before them goes on."""
    before = keys(pictures, tmp_path)
    changes = ("max_skipped_steps=3", "loader_threads=4", "batches_ahead=9", "shards_ahead=1")
    assert keys(pictures, tmp_path, *(f"denoiser.{change}" for change in changes)) == before
    assert keys(pictures, tmp_path, "denoiser.lr=7e-3") != before


def test_what_is_only_measured_makes_nothing_anew(pictures, tmp_path):
    watching = ["align.validate_every=7", "align.quality_every=9", "align.bundle_every=3", "decoder.best_by=val/l1"]
    assert keys(pictures, tmp_path) == keys(pictures, tmp_path, *watching)
    early = keys(pictures, tmp_path, "align.early_stop_patience=2")
    assert [name for name in early if early[name] != keys(pictures, tmp_path)[name]][0] == "align"


def test_an_autoencoder_is_continued_when_the_decoder_is_chosen_anew(pictures, tmp_path):
    preprocess(settings(pictures, tmp_path / "pixels"))

    def run(steps, *changes):
        preset = override(debug(), [f"autoencoder.steps={steps}", *changes])
        places = {"data": str(tmp_path / "pixels"), "run_dir": str(tmp_path / "run"), "device": "cpu"}
        return train("autoencoder", preset, **places)

    run(2)
    longer = run(4, DECODER)
    assert longer.resumed_from == 2 and longer.steps == 4
    assert load_bundle(longer.bundle).config.decoder.kind == "light"
    finished = run(4)  # nothing to train, and the bundle tells of the newest preset
    assert finished.resumed_from == finished.steps == 4 and finished.last_loss == longer.last_loss
    assert load_bundle(finished.bundle).config.decoder.kind == "liif"
    with pytest.raises(UserError, match="different model; choose another run folder"):
        run(6, "model.autoencoder.num_res_blocks=3")
