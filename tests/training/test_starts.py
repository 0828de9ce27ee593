"""Fine-tuning: every stage begins with the weights that it was given, says so, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from direct_settings import DIRECT
from stage_inputs import Shop
from torch import nn

from pipeline import storage
from pipeline.bundle import Bundle, build_autoencoder, build_decoder, build_denoiser, load_bundle, save_bundle
from pipeline.card import model_card
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.starter import starter_path
from preprocess.manifest import load_manifest
from training.config import override
from training.presets import debug, get_preset
from training.run import TrainResult, train
from training.starts import start_decoder, with_init, with_whole

Run = Callable[..., TrainResult]
JOINT = ("model.task=sr", "model.lr_size=8", "autoencoder.decoder=implicit")
SAME_BLOCKS = ("model.decoder.base_width=8", "model.decoder.width_mult=[1,1,2]")
STILL = ("lr=1e-12", "ema_decay=0", "steps=1")
"""A step that moves no weight by more than rounding."""


def still(stage: str, *settings: str) -> list[str]:
    return [f"{stage}.{setting}" for setting in (*STILL, *settings)]


def largest_change(first: nn.Module | None, second: nn.Module | None) -> float:
    assert first is not None and second is not None
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Somebody's model with the same shapes and other weights, trained at another scale."""
    model = override(debug(), ["model.scale_factor=0.37", "model.name=theirs"]).model
    torch.manual_seed(11)
    url = str(tmp_path_factory.mktemp("other") / "bundle")
    parts = build_autoencoder(model), build_decoder(model), build_denoiser(model)
    imported = {"imported_from": {"format": "ldm", "file": "model.ckpt"}}
    save_bundle(url, Bundle(model, *parts, meta=imported))
    return url


@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "denoiser", "align"])
def test_a_stage_begins_with_the_weights_of_another_bundle_and_says_so(
    run_stage: Run, other: str, tmp_path: Path, stage: str
) -> None:
    part = "denoiser" if stage == "align" else stage
    settings = ["model.scale_factor=0.37"] if part == "denoiser" else []
    result = run_stage(stage, *still(stage, f"start={other}"), *settings)
    theirs, made = load_bundle(other), load_bundle(result.bundle)
    assert largest_change(getattr(theirs, part), getattr(made, part)) < 1e-6
    started = made.meta["stages"][stage]["started_from"][part]
    assert (started["part"], started["of"], started["model"]) == (part, other, "theirs") and len(
        started["sha256"]
    ) == 64
    assert storage.read_json(str(tmp_path / stage / "run.json"))["started_from"][part] == started
    assert f"started from the {part} of {other} (theirs" in model_card(made.config, made.meta)
    if stage == "autoencoder":
        assert made.meta["imported_from"]["file"] == "model.ckpt"
    if stage == "denoiser":  # its weights were trained with this scale, whatever the data's is
        assert made.config.scale_factor == 0.37


def test_a_denoiser_that_goes_on_keeps_the_schedule_of_its_weights_and_may_change_its_dropout(
    run_stage: Run, other: str, tmp_path: Path
) -> None:
    theirs = load_bundle(other)
    schedule = dataclasses.replace(theirs.config.schedule, beta_end=0.015)
    url = str(tmp_path / "theirs")
    save_bundle(url, dataclasses.replace(theirs, config=dataclasses.replace(theirs.config, schedule=schedule)))
    settings = [*still("denoiser", f"start={url}"), "model.denoiser.dropout=0.1"]
    with pytest.raises(UserError, match="schedule.beta_end = 0.015 in the bundle and 0.0195 in the preset"):
        run_stage("denoiser", *settings)
    made = load_bundle(run_stage("denoiser", *settings, "model.schedule.beta_end=0.015").bundle)
    assert made.config.schedule == schedule and made.config.denoiser.dropout == 0.1
    aligned = load_bundle(run_stage("align", *still("align", f"start={url}"), "model.schedule.beta_end=0.015").bundle)
    assert (aligned.config.schedule, aligned.config.scale_factor) == (schedule, 0.37)


def test_the_implicit_decoder_alone_starts_the_joint_first_stage(shop: Shop, other: str, tmp_path: Path) -> None:
    preset = with_init(override(debug(), [*JOINT, *still("autoencoder")]), "autoencoder", [f"decoder={other}"])
    made = load_bundle(train("autoencoder", preset, data=shop.pixels, run_dir=str(tmp_path), device="cpu").bundle)
    theirs = load_bundle(other)
    assert largest_change(theirs.decoder, made.decoder) < 1e-6
    assert theirs.autoencoder.identity() != made.autoencoder.identity()
    assert made.meta["stages"]["autoencoder"]["started_from"].keys() == {"decoder"}


def test_d_phi_of_another_kind_does_not_start_the_joint_first_stage(shop: Shop, tmp_path: Path) -> None:
    preset = override(debug(), [*JOINT, *SAME_BLOCKS])
    vq = override(debug(), ["model.autoencoder.kind=vq"]).model
    save_bundle(url := str(tmp_path / "vq"), Bundle(vq, build_autoencoder(vq)))
    preset = with_init(preset, "autoencoder", ["decoder=autoencoder"])
    with pytest.raises(UserError, match="autoencoder.kind = 'vq' in the bundle and 'kl' in the preset"):
        train("autoencoder", preset, data=shop.pixels, bundle=url, run_dir=str(tmp_path / "run"), device="cpu")


def test_what_is_told_of_weights_goes_with_them(run_stage: Run, shop: Shop, other: str, tmp_path: Path) -> None:
    """Where they were imported from, and the stages that made a denoiser: of new weights neither is true."""

    def meta(stage: str, *settings: str, bundle: str, folder: str) -> dict[str, Any]:
        settings = (*still(stage, *settings), "model.scale_factor=0.37")
        return load_bundle(run_stage(stage, *settings, bundle=bundle, run_dir=tmp_path / folder).bundle).meta

    began = meta("denoiser", f"start={other}", bundle=shop.bundle, folder="began")
    assert began["imported_from"]["file"] == "model.ckpt" and began["stages"].keys() == {"denoiser"}
    aligned = meta("align", bundle=str(tmp_path / "began/bundle"), folder="aligned")
    assert aligned["stages"].keys() == {"denoiser", "align"}
    tuned = meta("denoiser", "start=bundle", bundle=str(tmp_path / "aligned/bundle"), folder="tuned")
    assert tuned["stages"].keys() == {"denoiser", "align"}
    moved = meta("align", f"start={tmp_path}/began/bundle", bundle=str(tmp_path / "tuned/bundle"), folder="moved")
    assert moved["stages"]["denoiser"]["started_from"] == began["stages"]["denoiser"]["started_from"]
    anew = meta("denoiser", bundle=str(tmp_path / "aligned/bundle"), folder="anew")
    assert anew["stages"].keys() == {"denoiser"}
    preset = override(debug(), still("autoencoder"))
    first = train("autoencoder", preset, data=shop.pixels, bundle=other, run_dir=str(tmp_path / "first"), device="cpu")
    assert "imported_from" not in load_bundle(first.bundle).meta


def test_what_is_asked_for_and_has_no_use_is_told_in_a_line(
    run_stage: Run, shop: Shop, other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = itertools.count()

    def told(stage: str, *settings: str, bundle: str = "") -> list[str]:
        caplog.clear()
        data, run_dir = shop.pixels if stage == "autoencoder" else shop.data, str(tmp_path / f"run{next(numbers)}")
        preset = override(debug(), [f"{stage}.steps=0", *settings])
        train(stage, preset, data=data, bundle=bundle or None, run_dir=run_dir, device="cpu")
        said = [record.getMessage() for record in caplog.records]
        return [line for line in said if "is used" in line or "not used" in line]

    assert told("autoencoder", bundle=other) == [
        "autoencoder: nothing of --bundle is used; its autoencoder goes on with --init bundle"
    ]
    assert told("autoencoder", "autoencoder.start=bundle", bundle=other) == [] == told("autoencoder")
    assert told("autoencoder", "model.scale_factor=0.5") == [
        "autoencoder: model.scale_factor = 0.5 is not used; the data decides it"
    ]
    measured = load_manifest(shop.data).scale_factor
    assert told("denoiser", "model.scale_factor=0.5", bundle=shop.bundle) == [
        f"denoiser: model.scale_factor = 0.5 is not used; data and bundle have {measured:g}"
    ]
    assert told("denoiser", f"model.scale_factor={measured!r}", bundle=shop.bundle) == []
    (line,) = told("align", "model.scale_factor=0.5", bundle=shop.bundle)
    assert line.endswith(f"{load_bundle(shop.bundle).config.scale_factor:g}")


def test_new_weights_start_from_nothing(run_stage: Run, shop: Shop) -> None:
    made = load_bundle(run_stage("denoiser", *still("denoiser")).bundle)
    assert "started_from" not in made.meta["stages"]["denoiser"]
    assert largest_change(load_bundle(shop.bundle).denoiser, made.denoiser) > 0.01


def test_an_only_bundle_gives_the_other_parts_too(run_stage: Run, shop: Shop) -> None:
    result = run_stage("decoder", *still("decoder", f"start={shop.bundle}"), bundle="")
    before, made = load_bundle(shop.bundle), load_bundle(result.bundle)
    assert largest_change(before.denoiser, made.denoiser) == 0.0
    assert before.autoencoder.identity() == made.autoencoder.identity()


def test_the_starter_goes_on(shop: Shop, tmp_path: Path) -> None:
    settings = ["model.image_size=32", *still("decoder", "global_batch=2", "input_cells=12", "precision=fp32")]
    preset = with_init(override(get_preset("starter"), settings), "decoder", ["starter:faithful"])
    result = train("decoder", preset, data=shop.pixels, run_dir=str(tmp_path / "run"), device="cpu")
    made, starter = load_bundle(result.bundle), load_bundle(starter_path())
    assert largest_change(starter.decoder, made.decoder) < 1e-6
    assert made.meta["stages"]["decoder"]["started_from"]["decoder"]["of"] == "starter:faithful"


def test_training_begins_with_d_phi_of_the_autoencoder(run_stage: Run, shop: Shop) -> None:
    result = run_stage("decoder", *SAME_BLOCKS, *still("decoder", "start=autoencoder"), bundle=_first(shop))
    made = load_bundle(result.bundle)
    assert made.decoder is not None
    own = made.autoencoder.decoder.state_dict()
    trunk = {n: t for n, t in made.decoder.trunk.state_dict().items() if not n.startswith("post_quant_conv")}
    assert max(float((own[name] - tensor).abs().max()) for name, tensor in trunk.items()) < 1e-6
    assert made.meta["stages"]["decoder"]["started_from"]["decoder"]["part"] == "autoencoder"


def _first(shop: Shop) -> str:
    return str(Path(shop.bundle).parent / "first")  # the autoencoder alone


def test_the_joint_first_stage_starts_part_by_part(shop: Shop, other: str, tmp_path: Path) -> None:
    preset = override(debug(), [*JOINT, *still("autoencoder")])
    preset = with_init(preset, "autoencoder", [other, f"decoder={shop.bundle}"])
    result = train("autoencoder", preset, data=shop.pixels, run_dir=str(tmp_path / "run"), device="cpu")
    made = load_bundle(result.bundle)
    assert largest_change(load_bundle(shop.bundle).decoder, made.decoder) < 1e-6
    theirs = load_bundle(other).autoencoder.state_dict()
    assert max(float((theirs[n] - t).abs().max()) for n, t in made.autoencoder.state_dict().items()) < 1e-6
    assert made.meta["stages"]["autoencoder"]["started_from"].keys() == {"autoencoder", "decoder"}


def test_a_run_goes_on_only_from_the_weights_that_it_began_with(run_stage: Run, other: str, tmp_path: Path) -> None:
    run_stage("decoder", f"decoder.start={other}", run_dir=tmp_path / "run")
    moved = tmp_path / "moved"
    storage.publish_dir(other, str(moved), last="config.json")
    again = run_stage("decoder", f"decoder.start={moved}", "decoder.steps=6", run_dir=tmp_path / "run")
    assert again.resumed_from == 4  # the weights count, not where they lie
    with pytest.raises(UserError, match="different bundle"):
        run_stage("decoder", "decoder.start=bundle", "decoder.steps=8", run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("autoencoder", ["model.autoencoder.kind=vq"], r"autoencoder.kind = 'kl' in the bundle and 'vq' in the preset"),
        ("autoencoder", ["model.autoencoder.base_width=16"], r"the autoencoder of /.* has other .*base_width = 8 in"),
        ("decoder", ["model.decoder.mlp_width=20"], r"decoder.mlp_width = 16 in the bundle and 20 in the preset"),
        ("denoiser", ["model.denoiser.width_mult=[1,1]"], r"width_mult = \[1, 2\] in the bundle and \[1, 1\] in the"),
        ("denoiser", ["model.task=sr", "model.lr_size=8"], r"task = 'generation' in the bundle and 'sr' in the preset"),
        ("denoiser", ["model.schedule.prediction=v"], r"schedule.prediction = 'eps' in the bundle and 'v' in the"),
        ("align", ["model.schedule.prediction=v"], r"the schedule of /.*schedule.prediction = 'eps' in the bundle and"),
    ],
)
def test_what_does_not_fit_is_one_line(
    run_stage: Run, other: str, tmp_path: Path, stage: str, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run_stage(stage, f"{stage}.start={other}", *settings)
    assert "\n" not in str(error.value) and not (tmp_path / stage).exists()


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("decoder", ["decoder.start=autoencoder"], r"decoder.width_mult = \[1, 1, 2\] in .* and \[1, 2\] in the"),
        (
            "decoder",
            [*SAME_BLOCKS, "model.decoder.norm=none", "decoder.start=autoencoder"],
            "norm = 'group' in",
        ),
        ("decoder", ["decoder.start=bundle"], "needs a bundle with the decoder, and the bundle has none; train stage"),
        ("decoder", ["decoder.start=linaer"], "'linaer' is not allowed"),
        ("denoiser", ["denoiser.start=/nowhere/at/all"], "no bundle at /nowhere/at/all"),
    ],
)
def test_what_is_not_there_is_one_line(
    run_stage: Run, shop: Shop, stage: str, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run_stage(stage, *settings, bundle=_first(shop))
    assert "\n" not in str(error.value)


def test_init_is_a_setting_of_the_stage(other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_init(debug(), "decoder", ["autoencoder"]).decoder.start == "autoencoder"
    assert with_init(debug(), "denoiser", ["denoiser=runs/x"]).denoiser.start == str(tmp_path / "runs/x")
    assert with_init(debug(), "align", ["models:/faces@champion"]).align.start == "models:/faces@champion"
    with pytest.raises(UserError, match="stage denoiser does not train the decoder; it trains denoiser"):
        with_init(debug(), "denoiser", ["decoder=bundle"])
    with pytest.raises(UserError, match="start = 'random' is not allowed"):
        with_init(debug(), "align", ["random"])
    whole = with_whole(debug(), other, other)
    assert (whole.decoder.start, whole.denoiser.start, whole.align.start) == (other, other, "bundle")


def test_whole_of_a_first_stage_alone_starts_d_phi_where_it_fits(shop: Shop) -> None:
    first = _first(shop)
    assert with_whole(override(debug(), [*SAME_BLOCKS]), first, first).decoder.start == "autoencoder"
    assert with_whole(debug(), first, first).decoder.start == "random"


def test_a_decoder_for_latents_may_become_one_for_conditions(shop: Shop) -> None:
    model: ModelConfig = override(debug(), DIRECT).model
    decoder = build_decoder(model)
    start_decoder(decoder, "bundle", Bundle(model, build_autoencoder(model), build_decoder(model)))
