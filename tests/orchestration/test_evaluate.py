"""Evaluation of a tiny model on a folder of pictures: what is measured, that batching and resuming change nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bundle import make_bundle, tiny_config

from orchestration.evaluation.evaluate import evaluate
from pipeline.errors import UserError
from pipeline.images import from_uint8, to_uint8
from pipeline.metrics.psnr import psnr
from pipeline.model import LatentZoom
from preprocess.config import PreprocessConfig
from preprocess.run import preprocess
from training.evaluation.report import Report
from training.evaluation.spec import ONE_STEP, EvaluationSpec
from training.evaluation.store import ChunkStore


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(5):
        small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {task: make_bundle(folder / task, task=task) for task in ("generation", "sr")}


def values(report):
    return {(f.name, f.method, f.setting): f.value for f in report.figures}


def test_reconstruction_measures_our_decoder_and_both_baselines(data, bundles):
    spec = EvaluationSpec(task="reconstruction", sizes=(32, 20), num=3)
    report, pictures = evaluate(bundles["generation"], data, spec, progress=False)
    figure = report.get("psnr_rgb", "32x32")
    assert figure.num == 3 and figure.low <= figure.value <= figure.high and "RGB" in figure.protocol
    assert {f.method for f in report.figures} == {"ours", "nearest", "bicubic", "lanczos"}

    # by hand
    model = LatentZoom.load(bundles["generation"])
    total = 0.0
    for i in range(3):
        image = torch.from_numpy(np.asarray(Image.open(f"{data}/{i}.png")).copy()).permute(2, 0, 1)[None]
        image = to_uint8(torch.nn.functional.interpolate(from_uint8(image), (32, 32), mode="bicubic", antialias=True))
        total += float(psnr(to_uint8(model.decode(model.encode(from_uint8(image)), (32, 32))), image))
    assert figure.value == pytest.approx(total / 3, abs=0.02)
    assert pictures["picture|truth|32x32|0"].shape == (32, 32, 3)
    assert Report.from_dict(report.to_json()) == report


@pytest.mark.parametrize("task", ["generation", "sr"])
def test_batch_size_and_chunks_do_not_change_figures(data, bundles, task):
    options = {"sizes": (16, 32)} if task == "generation" else {"scales": (2.0, 3.3), "sr_mode": "fixed-input"}
    one = EvaluationSpec(task=task, num_steps=2, **options)
    two = EvaluationSpec(task=task, num_steps=2, batch_size=2, chunk_size=3, **options)
    first, _ = evaluate(bundles[task], data, one, progress=False)
    second, _ = evaluate(bundles[task], data, two, progress=False)
    assert values(first).keys() == values(second).keys()
    for key, value in values(first).items():
        assert values(second)[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert first.num == 5 and any("50000 samples were asked for" in note for note in first.notes)


def test_a_distilled_model_takes_its_own_step_and_stands_beside_its_teacher(data, bundles, tmp_path):
    student = make_bundle(tmp_path / "student", task="sr", distilled_steps=1)
    options = {"task": "sr", "scales": (2.0,), "num": 3, "sr_mode": "fixed-input"}
    spec = EvaluationSpec(**options, teacher=bundles["sr"], teacher_steps=2)
    report, pictures = evaluate(student, data, spec, progress=False)
    assert report.sampler == ONE_STEP and report.spec["num_steps"] is None
    assert {f.method for f in report.figures} == {"ours", "teacher", "nearest", "bicubic", "lanczos"}
    alone, _ = evaluate(bundles["sr"], data, EvaluationSpec(**options, num_steps=2), progress=False)
    assert report.get("psnr_rgb", "x2", "teacher").value == alone.get("psnr_rgb", "x2").value
    one, _ = evaluate(student, data, EvaluationSpec(**options, num_steps=1), progress=False)
    assert one.get("psnr_rgb", "x2").value == report.get("psnr_rgb", "x2").value
    assert pictures["picture|teacher|x2|0"].shape == (16, 16, 3)
    assert any("Teacher: " in note and "2 steps" in note for note in report.notes)
    with pytest.raises(UserError, match="was distilled to 1 step; leave it out"):
        evaluate(student, data, EvaluationSpec(**options, num_steps=20), progress=False)
    with pytest.raises(UserError, match="for task sr only"):
        EvaluationSpec(task="generation", teacher=student)


def test_generation_without_weights_never_uses_the_standard_names(data, bundles):
    spec = EvaluationSpec(task="generation", sizes=(16, 24), num_steps=2)
    report, _ = evaluate(bundles["generation"], data, spec, progress=False)
    names = {f.name for f in report.figures}
    assert {"kid_random_vgg", "precision_random_vgg", "selfssim"} <= names
    assert not names & {"fid", "kid", "precision", "recall", "lpips"}
    assert any("at least 65 samples" in note and "got 5" in note for note in report.notes)
    assert any("stand in" in note for note in report.notes)


def test_an_interrupted_evaluation_continues(data, bundles, tmp_path, monkeypatch):
    from orchestration.evaluation import evaluate as module

    spec = EvaluationSpec(task="sr", scales=(2.0,), chunk_size=2, num_steps=2, sr_mode="fixed-input")
    expected, _ = evaluate(bundles["sr"], data, spec, progress=False)
    original, seen = module.ChunkWorker.run, []

    def run(self, start, stop):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(start)
        return original(self, start, stop)

    monkeypatch.setattr(module.ChunkWorker, "run", run)
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundles["sr"], data, spec, work_dir=str(tmp_path), progress=False)
    monkeypatch.setattr(module.ChunkWorker, "run", lambda self, a, b: seen.append(a) or original(self, a, b))
    again, _ = evaluate(bundles["sr"], data, spec, work_dir=str(tmp_path), progress=False)
    assert seen == [0, 2, 4] and values(again) == values(expected)


@pytest.mark.parametrize("is_remote", [False, True])
def test_arrays_are_read_when_asked_for_and_none_is_kept(tmp_path, is_remote):
    folder = f"memory://{tmp_path}/chunks" if is_remote else str(tmp_path / "chunks")
    store = ChunkStore(folder, [(0, 2), (2, 4), (4, 5)], tmp_path / "copies")
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert store.missing() == [(0, 2), (2, 4), (4, 5)]
    for start, stop in reversed(store.missing()):
        store.write((start, stop), {"feature": features[start:stop], f"picture|{start}": np.full((2, 2), start)})
    assert store.missing() == []
    store.open()
    assert sorted(store) == ["feature", "picture|0", "picture|2", "picture|4"]
    assert np.array_equal(store["feature"], features) and store["feature"] is not store["feature"]
    assert np.array_equal(store["picture|2"], np.full((2, 2), 2))


def test_it_does_not_matter_which_autoencoder_encoded_the_data(data, bundles, tmp_path):
    """Only pixels are read: a model that brings an autoencoder of its own is measured on the champion's shards too."""
    found = []
    for seed in (0, 5):
        dest = str(tmp_path / f"shards-{seed}")
        config = PreprocessConfig(source_url=data, dest=dest, size=32, batch_size=4, encode_threads=1)
        preprocess(config, autoencoder=make_bundle(tmp_path / f"b{seed}", seed=seed))
        spec = EvaluationSpec(task="reconstruction", split="train", num=2)
        found.append(values(evaluate(bundles["generation"], dest, spec, progress=False)[0]))
    assert found[0] == found[1]


def mixed_pictures(folder):
    generator = np.random.default_rng(2)
    for i, shape in enumerate([(40, 64), (90, 33), (24, 24), (64, 64)]):
        noise = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return str(folder)


def test_figures_of_a_folder_of_mixed_sizes_do_not_depend_on_the_batch(bundles, tmp_path):
    pictures = mixed_pictures(tmp_path)
    found = []
    for batch_size in (1, 2, 4):
        spec = EvaluationSpec(task="generation", sizes=(16, 32), num_steps=1, batch_size=batch_size)
        found.append(values(evaluate(bundles["generation"], pictures, spec, progress=False)[0]))
    assert any("kid" in name for name, *_ in found[0])
    for key, value in found[0].items():
        assert [other[key] for other in found] == pytest.approx([value] * 3, rel=1e-3, abs=1e-3), key


def test_one_sample_leaves_out_what_needs_more_and_goes_on(data, bundles):
    spec = EvaluationSpec(task="generation", sizes=(16, 24), num_steps=1, num=1)
    report, _ = evaluate(bundles["generation"], data, spec, progress=False)
    assert {f.name for f in report.figures} == {"selfssim"}
    for words in ("kid_random_vgg is left out: KID needs at least 2 samples", "fid_random_vgg is left out"):
        assert any(words in note for note in report.notes), report.notes


def test_shards_say_which_data_set_they_are(data, bundles, tmp_path):
    (tmp_path / "faces").mkdir()
    for i in range(3):
        Image.open(f"{data}/{i}.png").save(tmp_path / "faces" / f"{i}.png")
    found = {}
    for kind in ("folder", "celebahq"):
        config = PreprocessConfig(source=kind, source_url=str(tmp_path / "faces"), dest=str(tmp_path / kind), size=32)
        preprocess(config)
        spec = EvaluationSpec(task="reconstruction", num=1, split="train")
        found[kind] = evaluate(bundles["generation"], config.dest, spec, progress=False)[0].dataset
    assert found == {"folder": "", "celebahq": "celebahq"}
    named = EvaluationSpec(task="reconstruction", num=1, dataset="lsun-tower")
    assert evaluate(bundles["generation"], data, named, progress=False)[0].dataset == "lsun-tower"
    with pytest.raises(UserError, match="dataset = 'faces' has no published figures"):
        EvaluationSpec(task="generation", dataset="faces")


def test_fixed_truth_handles_pictures_of_any_shape(bundles, tmp_path):
    generator = np.random.default_rng(1)
    for i, shape in enumerate([(50, 64), (64, 40)]):
        Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    spec = EvaluationSpec(task="sr", scales=(2.5,), num_steps=1, protocols=("rgb", "benchmark"))
    report, _ = evaluate(bundles["sr"], str(tmp_path), spec, progress=False)
    assert report.get("psnr_benchmark", "x2.5").num == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "sr", "scales": (9.0,), "sr_mode": "fixed-input"}, "needs a truth of 72 pixels"),
        ({"task": "reconstruction", "sizes": (33,)}, "no truth"),
    ],
)
def test_impossible_settings_are_refused(data, bundles, options, words):
    with pytest.raises(UserError, match=words):
        evaluate(bundles["sr"], data, EvaluationSpec(**options), progress=False)


def test_missing_data_and_bad_options():
    with pytest.raises(UserError, match="scales"):
        EvaluationSpec(task="sr")
    with pytest.raises(UserError, match="task"):
        EvaluationSpec(task="x")


def test_noise_on_the_condition_is_part_of_what_is_measured(data, tmp_path):
    config = tiny_config("sr")
    config = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, condition_noise=0.5))
    bundle = make_bundle(tmp_path / "noisy", config=config)
    specs = [EvaluationSpec(task="sr", scales=(2.0,), num=1, num_steps=2, condition_noise=s) for s in (0.0, 0.4)]
    plain, noisy = (evaluate(bundle, data, spec, progress=False)[0] for spec in specs)
    assert noisy.sampler == "dpm++, 2 steps, eta 0, condition noise 0.4" and "noise" not in plain.sampler
    assert noisy.get("psnr_rgb", "x2").value != plain.get("psnr_rgb", "x2").value
    assert len({spec.fingerprint("b", "d") for spec in specs}) == 2
    for bad in ({"task": "generation", "condition_noise": 0.1}, {"condition_noise": 1.0}, {"condition_noise": -0.1}):
        with pytest.raises(UserError, match="condition_noise = .* is not allowed"):
            EvaluationSpec(**{"task": "sr", "scales": (2.0,), **bad})
