"""Configurations of earlier versions: migrations by name, and runs that go on as they began."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from stage_inputs import Shop
from test_resume import losses

from pipeline import bundle as bundles
from pipeline import migrations, storage
from pipeline.config import ModelConfig, to_dict
from pipeline.errors import UserError
from pipeline.migrations import CONFIG_VERSION, Migration, differences, migrated
from training import migrations as of_training
from training import run as of_run
from training import session
from training.config import STAGES, Preset
from training.identity import HOW_ONLY, MAY_CHANGE, WATCHING
from training.migrations import ChangedDefault
from training.presets import get_preset
from training.run import TrainResult

Run = Callable[..., TrainResult]


def doubled(stored: dict) -> dict:
    stored["settings"]["lr"] *= 2
    return stored


def test_migrations_run_in_order_from_the_stored_version_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "latentzoom")
    steps = [
        Migration(2, "second", lambda c: {**c, "a": c["a"] + 1}),
        Migration(3, "third", lambda c: {**c, "a": c["a"] * 10, "b": {"c": 1}}),
    ]
    assert migrated({"a": 1}, 1, steps, "here") == {"a": 20, "b": {"c": 1}}
    assert (
        "here has configuration version 1; second: a 1 → 2" in caplog.text and "third: a 2 → 20, b None" in caplog.text
    )
    caplog.clear()
    assert migrated({"a": 1}, 2, steps, "here") == {"a": 10, "b": {"c": 1}}
    assert migrated({"a": 1}, 2, steps[:1], "here") == {"a": 1} and "second" not in caplog.text
    with pytest.raises(UserError, match="here was written by a later latentzoom .* update this installation"):
        migrated({}, CONFIG_VERSION + 1, steps, "here")
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3}) == [("a.c", 2, None), ("d", None, 3)]


def age(run_dir: Path, change: Callable[[dict], None] = lambda stored: None) -> None:
    """Make a run look as version 1 wrote it: no version in its files, and what `change` does to its settings."""
    (run_dir / "result.json").unlink(missing_ok=True)
    assert json.loads((run_dir / "run.json").read_text())["config_version"] == CONFIG_VERSION
    for path in (run_dir / "checkpoints").glob("*/manifest.json"):
        content = json.loads(path.read_text())
        stored = content["state"]["fingerprint"]
        assert stored.pop("config_version") == CONFIG_VERSION
        change(stored["settings"])
        path.write_text(json.dumps(content))


def test_an_older_first_stage_goes_on_by_the_same_command(
    run_stage: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """kl_weight was in another unit then, and adversarial_balance did not exist: the command says what it said, the run
    keeps what it had, and again after the next restart."""
    caplog.set_level(logging.INFO, "latentzoom")
    run, unit = tmp_path / "autoencoder", 3 * 32 * 32
    settings = ["autoencoder.kl_weight=1e-3", "autoencoder.checkpoint_every=2", "autoencoder.adversarial_weight=0.1"]
    as_it_was = [*settings[1:], f"autoencoder.kl_weight={1e-3 * unit!r}", "autoencoder.adversarial_balance=fixed"]
    run_stage("autoencoder", *as_it_was, "autoencoder.steps=2")

    def older(stored: dict) -> None:
        del stored["adversarial_balance"]
        stored["kl_weight"] /= unit

    age(run, older)
    for steps in (4, 6):  # the second time run.json is of today
        result = run_stage("autoencoder", *settings, f"autoencoder.steps={steps}")
        assert result.resumed_from == steps - 2
    assert "goes on with settings.kl_weight = 3.072, as it began; new runs have 0.001" in caplog.text
    assert "the first stage's loss in LDM's units: " in caplog.text
    written = json.loads((run / "run.json").read_text())
    assert written["settings"]["kl_weight"] == pytest.approx(3.072) and written["config_version"] == CONFIG_VERSION
    assert set(written["as_begun"]) == {"settings.kl_weight", "settings.adversarial_balance"}
    run_stage("autoencoder", *as_it_was, "autoencoder.steps=6", run_dir=tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    with pytest.raises(UserError, match=r"kl_weight was 3\.07.*, is 0\.5"):  # on purpose
        run_stage("autoencoder", *settings[1:], "autoencoder.kl_weight=0.5", "autoencoder.steps=8")


def test_a_new_default_refuses_no_run_of_yesterday(
    run_stage: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = ["denoiser.checkpoint_every=2", "denoiser.weight_decay=0.0"]
    run_stage("denoiser", *settings, "denoiser.steps=2")
    run, new = tmp_path / "denoiser", [settings[0], "denoiser.weight_decay=0.01"]  # as if that were the default now
    age(run)
    with pytest.raises(UserError, match=r"weight_decay was 0\.0, is 0\.01"):
        run_stage("denoiser", *new, "denoiser.steps=4", run_dir=run)
    change = ChangedDefault(2, "settings.weight_decay", 0.0, 0.01)
    monkeypatch.setattr(of_training, "CHANGED_DEFAULTS", (change,))
    result = run_stage("denoiser", *new, "denoiser.steps=4")
    assert result.resumed_from == 2
    run_stage("denoiser", *settings, "denoiser.steps=4", run_dir=tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


def test_a_default_that_changes_again_and_again_refuses_none_either(
    run_stage: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether the run was continued in between, so that its checkpoints are of that version, or not."""
    every = "denoiser.checkpoint_every=2"
    changes = (
        ChangedDefault(3, "settings.weight_decay", 0.0, 0.01, "denoiser"),
        ChangedDefault(4, "settings.weight_decay", 0.01, 0.02),
    )

    def at_version(version: int, default: float, steps: int, name: str) -> TrainResult:
        for module in (migrations, session, of_run):
            monkeypatch.setattr(module, "CONFIG_VERSION", version, raising=False)
        monkeypatch.setattr(of_training, "CHANGED_DEFAULTS", changes[: version - 2])
        settings = [every, f"denoiser.weight_decay={default}", f"denoiser.steps={steps}"]
        return run_stage("denoiser", *settings, run_dir=tmp_path / name)

    for name, versions in (("each", [(2, 0.0), (3, 0.01), (4, 0.02)]), ("last", [(2, 0.0), (4, 0.02)])):
        for number, (version, default) in enumerate(versions, start=1):
            result = at_version(version, default, 2 * number if number < len(versions) else 6, name)
            assert result.resumed_from == 2 * number - 2
    at_version(2, 0.0, 6, "whole")
    assert losses(tmp_path / "each") == losses(tmp_path / "last") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match=r"weight_decay was 0\.0, is 0\.03"):  # on purpose
        at_version(4, 0.03, 8, "each")


def test_every_default_that_changed_is_in_the_list() -> None:
    """What decides what is trained, by default and in each preset, as it was in the version that the file names. Where
    this fails, raise CONFIG_VERSION and add a `ChangedDefault`; the file stays as it is."""
    pinned = json.loads((Path(__file__).parents[1] / "data/defaults.json").read_text())
    for preset, others in pinned["presets"].items():
        today = deciding(preset)
        for key, was in {**pinned["defaults"], **others}.items():
            stage, _, name = key.rpartition(":")
            for change in of_training.CHANGED_DEFAULTS:
                is_it = change.name == name and change.stage in ("", stage) and change.version > pinned["version"]
                was = change.now if is_it and change.before == was else was
            assert key not in today or today[key] == was, f"{preset}: {key} was {was!r}, is {today[key]!r}"


def deciding(name: str) -> dict[str, object]:
    """Of a preset, or of none (""): "stage:settings.field" and ":model.part.field" that must not change in a run."""
    preset = get_preset(name) if name else Preset(name="", model=ModelConfig())
    found: dict[str, object] = {f":model.{key}": value for key, value in flat(to_dict(preset.model)).items()}
    for stage in STAGES:
        settings = to_dict(preset.stage(stage)).items()
        fixed = {key: value for key, value in settings if key not in MAY_CHANGE | HOW_ONLY | WATCHING}
        found |= {f"{stage}:settings.{key}": value for key, value in fixed.items()}
    return json.loads(json.dumps(found))


def flat(tree: dict, prefix: str = "") -> dict[str, object]:
    leaves = {f"{prefix}{key}": value for key, value in tree.items() if not isinstance(value, dict)}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
    return leaves


def test_a_bundle_carries_its_version_and_is_migrated(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "latentzoom")
    url = str(tmp_path / "bundle")
    bundles.save_bundle(url, bundles.load_bundle(shop.bundle))
    config = storage.read_json(f"{url}/config.json")
    assert config.pop("config_version") == CONFIG_VERSION
    config["model"]["side"] = config["model"].pop("image_size")  # as a field was called once
    storage.write_json(f"{url}/config.json", config)
    with pytest.raises(UserError, match="unknown field side"):
        bundles.load_bundle(url)
    renamed = Migration(
        2, "side is image_size", lambda m: {"image_size" if k == "side" else k: v for k, v in m.items()}
    )
    monkeypatch.setattr(bundles, "MODEL_MIGRATIONS", (renamed,))
    assert bundles.load_bundle(url).config == bundles.load_bundle(shop.bundle).config
    assert "side is image_size: side 32 → None, image_size None → 32" in caplog.text
    storage.write_json(f"{url}/config.json", {**config, "config_version": CONFIG_VERSION + 1})
    with pytest.raises(UserError, match="config.json was written by a later latentzoom"):
        bundles.load_bundle(url)
