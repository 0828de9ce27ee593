"""Register, promote, roll back and load again, on a real SQLite registry with a tiny model."""

from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import make_bundle

from orchestration.registry import versions as registry
from orchestration.tracking import store as tracking
from pipeline.bundle import load_bundle, save_bundle
from pipeline.errors import UserError
from pipeline.model import LatentZoom


def report(value, psnr=20.0, digest="d" * 64, **changes):
    figures = [
        {
            "name": "lpips",
            "method": "ours",
            "setting": s,
            "value": value,
            "low": value - 0.01,
            "high": value + 0.01,
            "protocol": "p",
            "num": 8,
            "resamples": [value, value + 1e-4, value - 1e-4],
        }
        for s in ("x2", "x4")
    ] + [
        {
            "name": "psnr_rgb",
            "method": "ours",
            "setting": "x2",
            "value": psnr,
            "low": None,
            "high": None,
            "protocol": "rgb",
            "num": 8,
        }
    ]
    base = {
        "task": "sr",
        "data": "/data/val",
        "data_digest": digest,
        "protocol_version": 1,
        "num": 8,
        "seed": 0,
        "sampler": "x",
        "figures": figures,
    }
    return base | changes


@pytest.fixture
def uri(tmp_path, cache):
    return tracking.tracking_uri(None, tmp_path / "store")


def test_register_load_promote_rollback(tmp_path, uri):
    first = make_bundle(tmp_path / "b1", seed=1)
    second = make_bundle(tmp_path / "b2", seed=2)
    one = registry.register(first, "faces", tracking_uri=uri, report=report(0.5), dataset=("/data/train", "t" * 64))
    assert one.version == "1"
    assert registry.get_version("faces", "candidate", tracking_uri=uri).version == "1"
    assert registry.get_version("faces", "champion", tracking_uri=uri) is None

    assert registry.promote("faces", tracking_uri=uri).promote  # the first model needs no comparison
    loaded = registry.load("models:/faces@champion", tracking_uri=uri)
    expected = LatentZoom.load(first).generate(1, (20, 30), seed=5, num_steps=2)[0]
    assert np.array_equal(np.asarray(loaded.generate(1, (20, 30), seed=5, num_steps=2)[0]), np.asarray(expected))

    registry.register(second, "faces", tracking_uri=uri, report=report(0.6))
    assert not registry.promote("faces", tracking_uri=uri).promote
    assert registry.get_version("faces", "champion", tracking_uri=uri).version == "1"

    registry.register(second, "faces", tracking_uri=uri, report=report(0.4))
    decision = registry.promote("faces", tracking_uri=uri)
    assert decision.promote and "better" in decision.reasons[0]
    champion = registry.get_version("faces", "champion", tracking_uri=uri)
    assert champion.version == "3" and "promoted" in champion.tags["latentzoom.promotion"]
    assert registry.resolve("models:/faces@champion", tracking_uri=uri).name == registry.bundle_digest(second)

    assert registry.rollback("faces", tracking_uri=uri).version == "1"
    assert registry.get_version("faces", "champion", tracking_uri=uri).version == "1"
    with pytest.raises(UserError, match="nothing to go back to"):
        registry.rollback("faces", tracking_uri=uri)


def test_metrics_hang_on_model_and_data(tmp_path, uri):
    version = registry.register(make_bundle(tmp_path / "b"), "m", tracking_uri=uri, report=report(0.5))
    model = tracking.client(uri).get_logged_model(version.model_id)
    linked = {m.key: m for m in model.metrics}
    assert linked["lpips/x2"].value == 0.5 and linked["lpips/x2"].dataset_digest == "d" * 36
    assert model.source_run_id == version.run_id and str(model.status) == "READY"
    found = tracking.client(uri).get_model_version("m", "1")
    assert "| lpips | x2 | ours | 0.5 |" in found.description and "latentzoom upscale" in found.description
    assert found.description.startswith("# tiny") and found.source == f"models:/{version.model_id}"


def test_other_data_is_refused(tmp_path, uri):
    bundle = make_bundle(tmp_path / "b")
    registry.register(bundle, "m", tracking_uri=uri, report=report(0.5))
    registry.promote("m", tracking_uri=uri)
    registry.register(bundle, "m", tracking_uri=uri, report=report(0.1, digest="e" * 64))
    with pytest.raises(UserError, match="not comparable: data set digest"):
        registry.promote("m", tracking_uri=uri)
    assert registry.get_version("m", "champion", tracking_uri=uri).version == "1"


def test_a_champion_that_changed_while_another_was_measured_is_not_judged_by_its_figures(tmp_path, uri):
    """Measuring takes hours; the report says which bundle it measured."""
    bundles = [make_bundle(tmp_path / f"b{seed}", seed=seed) for seed in (1, 2)]
    for bundle in bundles:
        registry.register(bundle, "m", tracking_uri=uri, report=report(0.5))
    registry.promote("m", tracking_uri=uri, candidate="1")
    mine, theirs = (report(0.1, bundle_digest=registry.bundle_digest(bundle)) for bundle in bundles)
    for reports in ((theirs, theirs), (mine, mine)):
        with pytest.raises(UserError, match="is not what was measured, an alias of m moved"):
            registry.promote("m", tracking_uri=uri, candidate_report=reports[1], champion_report=reports[0])
    assert registry.get_version("m", "champion", tracking_uri=uri).version == "1"


@pytest.mark.parametrize("damage", ["flip", "pickle", "missing", "link"])
def test_bad_bundles_are_refused_and_nothing_is_registered(tmp_path, uri, damage):
    bundle = Path(make_bundle(tmp_path / "b"))
    weights = bundle / "decoder.safetensors"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(data)
    elif damage == "pickle":
        (bundle / "python_model.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    elif damage == "missing":
        weights.unlink()
    else:
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    words = {"flip": "damaged", "pickle": "python_model.pkl", "missing": "missing", "link": "link"}[damage]
    with pytest.raises(UserError, match=words):
        registry.register(str(bundle), "m", tracking_uri=uri)
    assert not (tmp_path / "store").exists()


def test_damage_after_registration_is_found(tmp_path, uri):
    version = registry.register(make_bundle(tmp_path / "b"), "m", tracking_uri=uri)
    location = Path(tracking.client(uri).get_logged_model(version.model_id).artifact_location.removeprefix("file://"))
    weights = location / "artifacts/bundle/denoiser.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        registry.resolve("models:/m@candidate", tracking_uri=uri)


@pytest.mark.parametrize("text", ["models:/", "models:/a", "models:/a@", "models:/a/b", "models:/a/b@c"])
def test_bad_model_uris(text):
    with pytest.raises(UserError, match="not a model URI"):
        registry.parse_model_uri(text)


def test_unknown_model_is_one_clear_line(uri):
    tracking.make_store(uri)
    with pytest.raises(UserError, match="no alias 'champion' of model 'nobody'"):
        registry.resolve("models:/nobody@champion", tracking_uri=uri)


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a@b", "..", "a\nb"])
def test_a_name_that_no_model_can_have_is_refused_before_a_run_begins(tmp_path, uri, name):
    bundle = make_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="is not allowed for a model"):
        registry.register(bundle, name, tracking_uri=uri)
    assert not (tmp_path / "store").exists()


def test_a_name_with_a_dot_can_be_registered_and_addressed(tmp_path, uri):
    version = registry.register(make_bundle(tmp_path / "b"), "faces.v2", tracking_uri=uri)
    assert version.uri == "models:/faces.v2/1"
    assert registry.resolve("models:/faces.v2@candidate", tracking_uri=uri).is_dir()


def test_a_registration_that_fails_leaves_no_running_run_and_no_model(tmp_path, uri, monkeypatch):
    def refuse(*_: object) -> str:
        raise tracking.StoreError("the store went away")

    monkeypatch.setattr(registry, "_create_version", refuse)
    with pytest.raises(UserError, match="went away"):
        registry.register(make_bundle(tmp_path / "b"), "m", tracking_uri=uri)
    client = tracking.client(uri)
    experiment = [tracking.experiment_id(uri)]
    assert [run.info.status for run in client.search_runs(experiment)] == ["FAILED"]
    assert client.search_logged_models(experiment) == []


@pytest.mark.parametrize(
    ("task", "gone", "words"),
    [
        ("generation", ["decoder"], "has no decoder"),
        ("sr", ["denoiser"], "has no denoiser"),
        ("sr", ["decoder", "denoiser"], "has no decoder and no denoiser"),
    ],
)
def test_a_bundle_that_nobody_can_use_is_never_champion(tmp_path, uri, task, gone, words):
    whole = load_bundle(make_bundle(tmp_path / "whole", task=task))
    for part in gone:
        setattr(whole, part, None)
    save_bundle(str(tmp_path / "part"), whole)
    registry.register(str(tmp_path / "part"), "m", tracking_uri=uri)
    with pytest.raises(UserError, match=f"models:/m/1 cannot be champion: its bundle {words}"):
        registry.promote("m", tracking_uri=uri)
    assert registry.get_version("m", "champion", tracking_uri=uri) is None


def test_a_damaged_bundle_is_never_champion(tmp_path, uri):
    version = registry.register(make_bundle(tmp_path / "b"), "m", tracking_uri=uri)
    location = Path(tracking.client(uri).get_logged_model(version.model_id).artifact_location)
    (location / "artifacts/bundle/decoder.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        registry.promote("m", tracking_uri=uri)
    assert registry.get_version("m", "champion", tracking_uri=uri) is None
